"""Weights of anybody, ours too: read from a checkpoint, loaded into a model, or known by name."""
