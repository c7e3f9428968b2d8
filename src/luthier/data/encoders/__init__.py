"""Encoders turn examples of each kind into token rows."""
