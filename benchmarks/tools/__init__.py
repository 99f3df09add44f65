"""Tools for working on kernels, which are not installed: ahead-of-time compilation, search of launch settings."""
