"""Tools for developing kernels, not installed: ahead-of-time compilation, search of launch settings."""
