"""What a run was and did, as one HTML page; and several runs beside one another."""
