"""Benchmarks of operations: a file for each folder of `kernels/`, of the same name."""
