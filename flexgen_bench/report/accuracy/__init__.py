"""Pages of accuracy, from records alone."""
