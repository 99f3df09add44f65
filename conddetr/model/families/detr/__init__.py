"""The original DETR (Carion et al., ECCV 2020)."""
