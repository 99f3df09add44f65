"""Native CPU kernels for operations that PyTorch computes slowly there; on GPUs PyTorch's own operators run."""
