"""Weights of anybody, ours too.

`read` reads a checkpoint, in which `search` finds the model; `load` loads it into a model of ours; `public` knows the
published ones by name.
"""
