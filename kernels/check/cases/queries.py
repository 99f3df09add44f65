"""Problems of queries and boxes: embeddings, λ ⊙ p_s, positions of cells, predicted boxes."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from conddetr.kernels.attn import rectangle_padding
from conddetr.kernels.check.inputs import Inputs, Maker, strided
from conddetr.kernels.check.problem import Problem
from conddetr.kernels.position import grid_positions
from conddetr.kernels.prediction import predicted_boxes
from conddetr.kernels.query import spatial_query
from conddetr.kernels.registry import FLOATS
from conddetr.kernels.sine import conditional_spatial_query, sine_embedding

LAYERS, QUERIES, CHANNELS = 6, 300, 256
IMAGE, GRID = (800, 1066), (25, 34)


def problems(images: int) -> list[Problem]:
    """All problems of these operations."""
    return [
        _embedding("model", (QUERIES,), CHANNELS, is_model=True),
        _embedding("one point", (1,), 4),
        _embedding("no multiples of tiles", (3, 5), 20),
        _scaled("model", (images, QUERIES), CHANNELS, is_model=True),
        _scaled("one point", (1,), 4),
        _scaled("no multiples of tiles, with gaps in memory", (7, 9), 20, is_strided=True),
        _projected("model", images, QUERIES, CHANNELS, CHANNELS, is_model=True),
        replace(_projected("TF32", 2, QUERIES, CHANNELS, CHANNELS), is_tf32=True, dtypes=(torch.float32,)),
        _projected("one query", 1, 1, 4, 3),
        _projected("no multiples of tiles, with gaps in memory", 3, 21, 20, 33, is_strided=True),
        _positions("model", images, IMAGE, GRID, CHANNELS, is_model=True),
        _positions("one row of cells, an image that is all padding", 4, (31, 33), (1, 5), 36),
        _positions("no padding", 2, (160, 288), (5, 9), 64, is_padded=False),
        _boxes("model", images, is_model=True),
        _boxes("model, points of float32, in bfloat16", images, torch.bfloat16),
        _boxes("model, points of float32, in float16", images, torch.float16),
        _boxes("one query", 1, queries=1),
    ]


def _embedding(title: str, shape: tuple[int, ...], dim: int, is_model: bool = False) -> Problem:
    return Problem(
        "sine_embedding",
        title,
        lambda maker: {"points": maker.uniform(*shape, 2)},
        lambda inputs, backend: [sine_embedding(inputs["points"], dim, backend=backend)],
        ("points",),
        is_model=is_model,
    )


def _scaled(title: str, shape: tuple[int, ...], dim: int, is_model: bool = False, is_strided: bool = False) -> Problem:
    def make(maker: Maker) -> Inputs:
        transform = maker.normal(*shape, dim)
        return {"points": maker.uniform(*shape[-1:], 2), "transform": strided(transform) if is_strided else transform}

    return Problem(
        "conditional_spatial_query",
        title,
        make,
        lambda inputs, backend: [conditional_spatial_query(inputs["points"], inputs["transform"], backend=backend)],
        ("points", "transform"),
        is_model=is_model,
    )


def _projected(
    title: str,
    images: int,
    queries: int,
    channels: int,
    outputs: int,
    is_model: bool = False,
    is_strided: bool = False,
) -> Problem:
    names = ("transform", "embedding", "weight", "bias")

    def make(maker: Maker) -> Inputs:
        made = {
            "transform": maker.normal(images, queries, channels),
            "embedding": maker.normal(queries, channels),
            "weight": maker.normal(outputs, channels, scale=channels**-0.5),
        }
        if is_strided:
            made = {name: strided(x) for name, x in made.items()}
        return {**made, "bias": maker.normal(outputs)}

    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        return [spatial_query(*(inputs[name] for name in names), backend=backend)]

    return Problem("spatial_query", title, make, run, names, is_model=is_model)


def _positions(
    title: str,
    images: int,
    image_size: tuple[int, int],
    grid: tuple[int, int],
    dim: int,
    is_padded: bool = True,
    is_model: bool = False,
) -> Problem:
    def make(maker: Maker) -> Inputs:
        made = {"features": maker.normal(images, 1, *grid)}
        if is_padded:
            shares = ((1.0, 1.0), (1.0, 0.56), (0.84, 1.0), (0.0, 0.4) if not is_model else (1.0, 0.75))
            sizes = [[int(part * n) for part, n in zip(shares[i % 4], image_size, strict=True)] for i in range(images)]
            made["valid"] = maker.exactly(sizes, torch.int32)
        return made

    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        results = grid_positions(inputs["features"], image_size, dim, inputs.get("valid"), backend=backend)
        return [x for x in results if x is not None]

    def truth(inputs: Inputs) -> list[Tensor]:
        """The encoding in float64. Plain PyTorch counts cells in float32, as the official code does."""
        _, *others = run(inputs, "eager")
        cells = others[1] if others else torch.tensor([grid], device=inputs["features"].device)
        return [_encoding(rectangle_padding(cells, *grid).unflatten(1, grid), dim), *others]

    return Problem("grid_positions", title, make, run, is_model=is_model, truth=truth)


def _encoding(padding: Tensor, dim: int) -> Tensor:
    """The sine encoding of valid cells by its formula, float64: [B, h, w] -> [B, h·w, dim]."""
    valid = (~padding).double()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y, x = 2 * math.pi * y / (y[:, -1:] + 1e-6), 2 * math.pi * x / (x[:, :, -1:] + 1e-6)
    channel = torch.arange(dim // 2, device=padding.device)
    rate = 10000.0 ** (-2 * (channel // 2).double() / (dim // 2))
    phases = (y[..., None] * rate, x[..., None] * rate)
    return torch.cat([torch.where(channel % 2 == 0, phase.sin(), phase.cos()) for phase in phases], -1).flatten(1, 2)


def _boxes(
    title: str, images: int, half: torch.dtype | None = None, queries: int = QUERIES, is_model: bool = False
) -> Problem:
    def make(maker: Maker) -> Inputs:
        # Not on the border, where gradients vanish: PyTorch versions differ there.
        points = 0.05 + 0.9 * maker.uniform(queries, 2, dtype=torch.float32)
        offsets = maker.normal(LAYERS, images, queries, 4, dtype=half)
        return {"offsets": offsets, "points": points.to(maker.dtype)}

    return Problem(
        "predicted_boxes",
        title,
        make,
        lambda inputs, backend: [predicted_boxes(inputs["offsets"], inputs["points"], backend)],
        ("offsets", "points"),
        is_model=is_model,
        dtypes=FLOATS if half is None else (torch.float32,),
    )
