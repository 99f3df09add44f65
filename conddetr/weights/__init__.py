"""Weights from any source: official, HuggingFace's or ours.

`read` reads a checkpoint, in which `search` finds the model; `load` loads it into our model; `public` lists published
checkpoints by name.
"""
