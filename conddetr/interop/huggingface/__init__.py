"""transformers' Conditional DETR and DAB-DETR: their weights, and modules that take the place of theirs."""
