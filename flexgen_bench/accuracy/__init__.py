"""Accuracy through the same engine: tasks, an lm-eval model over any system, and paired comparisons."""
