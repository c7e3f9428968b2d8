"""Images of rows: found, checked and measured when rows are read, decoded when they train."""
