"""Modules that take the place of other people's, on the same parameters."""
