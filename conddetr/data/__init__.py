"""Images and annotations."""
