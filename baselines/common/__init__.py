"""What the performance models of several baselines share. Knows no torch."""
