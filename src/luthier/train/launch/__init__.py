"""A launch: what was asked for, that it is what runs, and that all its processes agree."""
