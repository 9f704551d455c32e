"""Runs a schedule with real tensors: lanes, weights, KV cache, sampling, generation."""
