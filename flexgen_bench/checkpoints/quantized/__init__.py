"""Checkpoints whose weights are quantized: which scheme, and from its tensors back to the weights."""
