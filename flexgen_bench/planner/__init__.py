"""What fits where, before anything runs. Knows no torch."""
