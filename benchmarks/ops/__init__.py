"""Benchmarks of operations: one file for each folder of `kernels/`, with the same name."""
