"""What every benchmark shares: checked results, interleaved timing, tables and result files.

On a null GPU, which computes nothing, benchmarks go through all their steps: no number is compared, no duration is
printed, and no file is written.
"""
