"""transformers' Conditional DETR and DAB-DETR: their weights, and our replacements for their modules."""
