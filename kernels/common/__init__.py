"""What several operations share, on the host and in Triton's kernels."""
