"""Encoder and decoder of transformers 5 from fused operations, as `conddetr.model.fast` computes ours.

Where all parts of one are plain, on a GPU. transformers' arithmetic stays: with auxiliary losses the next decoder layer
goes on from the normalised tokens, spatial keys are dense, and positions and queries may differ from image to image.
"""
