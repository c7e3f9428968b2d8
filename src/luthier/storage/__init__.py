"""Folders that are whole or absent, and their sizes in words."""
