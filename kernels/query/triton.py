"""The conditional spatial query and its projection as one matrix product; its left side λ ⊙ p_s is computed on loading.

A program handles a block of images and queries, so it reads the p_s that its images share once. In backward, the
gradient of λ ⊙ p_s is a tile of a product. From it a program computes the gradient of λ, and sums that of p_s over all
images, block by block, in a fixed order. It also writes λ ⊙ p_s, which forward did not save, for the matrix product
that gives the gradient of the weight.

p_s is read, not computed from reference points: its [Q, C] numbers stay in the cache, while sines for every image would
be more work than the product.

Shapes: transform (λ) [B, Q, C], embedding (p_s) [Q, C], weight [O, C], bias [O], out and grad [B, Q, O].
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.launch import cdiv, next_power_of_2
from conddetr.kernels.common.triton import load_float, precision, product, store_cast

SIZES = ("images", "queries")
"""Not specialised (`operators.py` says why)."""
ROWS = 64
"""Images times queries of a program at a time: the rows of a product on Hopper's tensor cores."""
MOST_IMAGES, MOST_IMAGES_BACKWARD = 8, 16
"""Most images among these rows. More images read p_s less often; in backward a program then loops over fewer blocks."""


@triton.jit
def block_of_rows(first, images, query, queries, IMAGES: tl.constexpr, QUERIES: tl.constexpr):
    """Row indices [IMAGES, QUERIES] in tensors [B · Q, …], 64 bits wide, and the mask of those that exist."""
    image = first + tl.arange(0, IMAGES)
    row = image.to(tl.int64)[:, None] * queries + query[None, :]
    return row, (image < images)[:, None] & (query < queries)[None, :]


@triton.jit
def flat(x, ROWS: tl.constexpr):
    """[images, queries] -> [rows, 1]."""
    return tl.reshape(x, (ROWS, 1))


@triton.jit(do_not_specialize=SIZES)
def spatial_query_kernel(
    transform, embedding, projection, projection_bias, out, images, queries,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = (transform ⊙ embedding) projectionᵀ + projection_bias; a tile of BLOCK_N outputs."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    row, inside = block_of_rows(tl.program_id(2) * IMAGES, images, query, queries, IMAGES, QUERIES)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < OUTPUTS
    total = tl.zeros((IMAGES * QUERIES, BLOCK_N), tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        is_channel = channel < CHANNELS
        mask = inside[:, :, None] & is_channel[None, None, :]
        scale = tl.load(transform + row[:, :, None] * CHANNELS + channel[None, None, :], mask=mask, other=0.0)
        own = query.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        p_s = tl.load(embedding + own, mask=(query < queries)[:, None] & is_channel[None, :], other=0.0)
        scaled = (scale.to(tl.float32) * p_s.to(tl.float32)[None, :, :]).to(out.dtype.element_ty)
        mask = is_output[:, None] & is_channel[None, :]
        right = tl.load(projection + output[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
        total = product(tl.reshape(scaled, (IMAGES * QUERIES, BLOCK_K)), tl.trans(right), total, PRECISION)
    total += load_float(projection_bias + output, is_output)[None, :]
    place = flat(row, IMAGES * QUERIES) * OUTPUTS + output[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=flat(inside, IMAGES * QUERIES) & is_output[None, :])


@triton.jit(do_not_specialize=SIZES)
def spatial_query_backward_kernel(
    grad, transform, embedding, projection, grad_transform, grad_embedding, scaled, images, queries,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, PRECISION: tl.constexpr, OF_TRANSFORM: tl.constexpr,
    OF_EMBEDDING: tl.constexpr, OF_WEIGHT: tl.constexpr,
    IMAGES: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of transform and embedding, and scaled = transform ⊙ embedding; BLOCK_N channels of each."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_channel = channel < CHANNELS
    own = query.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    is_own = (query < queries)[:, None] & is_channel[None, :]
    p_s = tl.load(embedding + own, mask=is_own, other=0.0)[None, :, :]
    total = tl.zeros((QUERIES, BLOCK_N), tl.float32)
    for first in range(0, images, IMAGES):
        row, inside = block_of_rows(first, images, query, queries, IMAGES, QUERIES)
        line, is_line = flat(row, IMAGES * QUERIES), flat(inside, IMAGES * QUERIES)
        slope = tl.zeros((IMAGES * QUERIES, BLOCK_N), tl.float32)
        for start in range(0, OUTPUTS, BLOCK_K):
            output = start + tl.arange(0, BLOCK_K)
            is_output = output < OUTPUTS
            left = tl.load(grad + line * OUTPUTS + output[None, :], mask=is_line & is_output[None, :], other=0.0)
            mask = is_output[:, None] & is_channel[None, :]
            right = tl.load(projection + output[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
            slope = product(left, right, slope, PRECISION)
        slope = tl.reshape(slope, (IMAGES, QUERIES, BLOCK_N))
        place = row[:, :, None] * CHANNELS + channel[None, None, :]
        mask = inside[:, :, None] & is_channel[None, None, :]
        if OF_TRANSFORM:
            store_cast(grad_transform + place, slope * p_s, mask)
        if OF_EMBEDDING or OF_WEIGHT:
            scale = load_float(transform + place, mask)
            if OF_WEIGHT:
                store_cast(scaled + place, scale * p_s, mask)
            total += tl.sum(slope * scale, axis=0)
    if OF_EMBEDDING:
        store_cast(grad_embedding + own, total, is_own)


@functools.cache
def launch(images: int, dtype: torch.dtype, backward: bool) -> dict[str, int | bool]:
    """Block sizes and compiler options, chosen by a model of Hopper; not yet tuned on a device."""
    block = min(MOST_IMAGES_BACKWARD if backward else MOST_IMAGES, next_power_of_2(images))
    sizes = {"IMAGES": block, "QUERIES": ROWS // block, "enable_fp_fusion": True}
    if dtype == torch.float32:
        # Only on request: `auto` does not take it. Nothing spills.
        return {**sizes, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    if backward:
        # With one image, the tile of p_s is as large as that of the product.
        width, stages = 32 if block == 1 else 64, 3
    else:
        # Narrow tiles for few images, so that there are more programs.
        width, stages = (32, 4) if block < MOST_IMAGES else (128, 3)
    return {**sizes, "BLOCK_N": width, "BLOCK_K": 64, "num_warps": 4, "num_stages": stages}


def forward(transform: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, Q, O]; all contiguous, of a bias [rows, O] the first row is read."""
    images, queries, channels = transform.shape
    outputs = weight.shape[0]
    out = transform.new_empty((images, queries, outputs))
    sizes = launch(max(images, 1), transform.dtype, False)
    if out.numel():
        blocks = (queries, sizes["QUERIES"]), (outputs, sizes["BLOCK_N"]), (images, sizes["IMAGES"])
        spatial_query_kernel[tuple(cdiv(*block) for block in blocks)](
            transform, embedding, weight, bias, out, images, queries,
            CHANNELS=channels, OUTPUTS=outputs, PRECISION=precision(transform), **sizes,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    transform: Tensor,
    embedding: Tensor,
    weight: Tensor,
    of_transform: bool,
    of_embedding: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of transform and embedding, and transform ⊙ embedding [B · Q, C] for that of the weight; those not
    requested are empty. All contiguous.
    """
    images, queries, channels = transform.shape
    shapes = (transform.shape, embedding.shape, (images * queries, channels))
    grad_transform, grad_embedding, scaled = (
        transform.new_empty(shape if wanted else 0)
        for shape, wanted in zip(shapes, (of_transform, of_embedding, of_weight), strict=True)
    )
    sizes = launch(max(images, 1), transform.dtype, True)
    if embedding.numel():
        blocks = (queries, sizes["QUERIES"]), (channels, sizes["BLOCK_N"])
        spatial_query_backward_kernel[tuple(cdiv(*block) for block in blocks)](
            grad, transform, embedding, weight, grad_transform, grad_embedding, scaled, images, queries,
            CHANNELS=channels, OUTPUTS=weight.shape[0], PRECISION=precision(transform),
            OF_TRANSFORM=of_transform, OF_EMBEDDING=of_embedding, OF_WEIGHT=of_weight, **sizes,
        )  # fmt: skip
    return grad_transform, grad_embedding, scaled
