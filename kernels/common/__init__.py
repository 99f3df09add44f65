"""Shared code of several operations, on the host and in Triton's kernels."""
