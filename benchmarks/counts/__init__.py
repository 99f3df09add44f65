"""The cost of steps on a GPU, counted without one; the committed counts are in this folder."""
