"""The operations of Conditional DETR, one folder each. This package depends on no model, image or training code."""

from conddetr.kernels.add_norm import add_norm
from conddetr.kernels.attn import conditional_attention
from conddetr.kernels.bits import drawn_probability, dropout_bits
from conddetr.kernels.boxes import matched_box_loss
from conddetr.kernels.check import check
from conddetr.kernels.conv import convolution, convolution_pair
from conddetr.kernels.cost import matching_cost
from conddetr.kernels.cpu.conv3x3 import convolution_3x3, convolution_3x3_weight_gradient
from conddetr.kernels.cpu.dropout import dropout_add
from conddetr.kernels.errors import prediction_errors
from conddetr.kernels.focal import focal_loss
from conddetr.kernels.match import linear_assignment
from conddetr.kernels.pool import max_pool
from conddetr.kernels.position import grid_positions
from conddetr.kernels.prediction import predicted_boxes
from conddetr.kernels.query import spatial_query
from conddetr.kernels.relu_dropout import relu_dropout
from conddetr.kernels.sine import conditional_spatial_query, sine_embedding
from conddetr.kernels.weights import prepare_weights

__all__ = [
    "add_norm",
    "check",
    "conditional_attention",
    "conditional_spatial_query",
    "convolution",
    "convolution_3x3",
    "convolution_3x3_weight_gradient",
    "convolution_pair",
    "drawn_probability",
    "dropout_add",
    "dropout_bits",
    "focal_loss",
    "grid_positions",
    "linear_assignment",
    "matched_box_loss",
    "matching_cost",
    "max_pool",
    "predicted_boxes",
    "prediction_errors",
    "prepare_weights",
    "relu_dropout",
    "sine_embedding",
    "spatial_query",
]
