"""Code that all benchmarks share: checked results, interleaved timing, tables and result files.

On a null GPU, which computes nothing, benchmarks run all their steps, but compare no number, print no duration and
write no file.
"""
