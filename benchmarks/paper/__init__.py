"""The numbers and the figure of the paper."""
