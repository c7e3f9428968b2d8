"""Seeing what trains: rows as coloured tokens, and the whole dataset checked against the rules."""
