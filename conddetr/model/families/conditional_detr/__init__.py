"""Conditional DETR (Meng et al., ICCV 2021)."""
