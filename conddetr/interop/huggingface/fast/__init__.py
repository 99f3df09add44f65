"""Encoder and decoder of transformers 5 from fused operations, as `conddetr.model.fast` computes ours.

They run on a GPU, each if all its parts are plain. transformers' arithmetic stays: with auxiliary losses the next
decoder layer gets the normalised tokens, spatial keys are dense, and positions and queries may differ between images.
"""
