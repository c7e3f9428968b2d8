"""What a run leaves behind: its directory, its facts, its metrics and its plot."""
