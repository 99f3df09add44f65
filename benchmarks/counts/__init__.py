"""What steps ask of a GPU, counted without one; the committed counts lie beside."""
