"""What PyTorch computes slowly on CPUs, computed there by native kernels; on GPUs PyTorch's own operators run."""
