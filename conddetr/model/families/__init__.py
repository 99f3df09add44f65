"""The families of detectors."""
