"""W (λ ⊙ p_s) + b, the projected conditional spatial query, against a product and `F.linear`.

Forward and backward; torch.compile of the two is another peer.
"""

import torch

from conddetr.kernels import spatial_query
from harness.machine import DEVICE, short_name
from harness.problem import Differentiated, Forward, PerImages, Tensors, against_pytorch, least
from harness.result import Work

QUERIES, CHANNELS = 300, 256


class Problem(PerImages, Differentiated):
    """One size: images per step, and the dtype."""

    dtypes = ("bfloat16",)

    @property
    def title(self) -> str:
        size = f"{self.images}×{QUERIES}×{CHANNELS}"
        return f"projected spatial query, {size}, forward + backward, {short_name(self.dtype)}"

    def make(self) -> Tensors:
        """λ of each image, p_s that all images share, weight and bias, and the gradient of the result."""
        generator = torch.Generator().manual_seed(0)
        tokens = (self.images, QUERIES, CHANNELS)
        shapes = {"transform": tokens, "embedding": tokens[1:], "weight": (CHANNELS, CHANNELS), "bias": (CHANNELS,)}
        made = {name: torch.randn(shape, generator=generator) for name, shape in {**shapes, "grad_out": tokens}.items()}
        return {name: x.to(DEVICE, self.dtype).requires_grad_(name in shapes) for name, x in made.items()}

    def forwards(self) -> dict[str, Forward]:
        return against_pytorch(spatial_query, ["triton"], "product, then F.linear")

    def work(self) -> Work:
        """Three products. λ read, the result written; in backward the result's gradient and λ read, λ's gradient
        written. Tensors that all images share are small in comparison.
        """
        numbers = self.images * QUERIES * CHANNELS
        return least(5 * numbers * self.dtype.itemsize, 3 * 2 * numbers * CHANNELS, self.dtype)
