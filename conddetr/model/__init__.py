"""The detectors: backbone, positions, transformers, heads, post-processing."""
