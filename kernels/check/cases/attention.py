"""Problems of conditional attention, of self-attention on its kernels, and of their dropout bits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels.attn import conditional_attention, dense_spatial_keys, rectangle_padding
from conddetr.kernels.attn.inputs import bits_shape
from conddetr.kernels.bits import drawn_probability, dropout_bits
from conddetr.kernels.bits.reference import unpacked
from conddetr.kernels.check.inputs import Inputs, Maker, strided
from conddetr.kernels.check.problem import Dropout, Peer, Problem

HEIGHT, WIDTH, QUERIES, HEADS, CHANNELS = 25, 34, 300, 8, 32
P = 0.1
VALID = ((HEIGHT, WIDTH), (HEIGHT, 19), (21, WIDTH), (HEIGHT, 26))
"""Cells of the model's images, in turn."""
CONTENT = ("q_content", "q_spatial", "k_content", "v")


@dataclass(frozen=True)
class Size:
    """Sizes of one problem."""

    images: int = 2
    queries: int = 5
    height: int = 4
    width: int = 7
    heads: int = 2
    widths: tuple[int, int, int] = (CHANNELS, CHANNELS, CHANNELS)
    """Channels of content, spatial part and value, per head."""
    valid: tuple[tuple[int, int], ...] = ()
    """Valid cells of the images, in turn; empty: there is no padding."""


def problems(images: int) -> list[Problem]:
    """All problems of these operations."""
    model = Size(images, QUERIES, HEIGHT, WIDTH, HEADS, valid=VALID)
    dense = Size(1, 100, HEIGHT, WIDTH, HEADS, valid=((21, 26),))
    return [
        _separable("model, separable keys", model, is_model=True),
        _separable("model, separable keys, dropout", model, P, is_model=True),
        replace(_separable("separable keys, TF32", replace(model, images=1)), is_tf32=True, dtypes=(torch.float32,)),
        _dense("dense keys", dense),
        _dense("dense keys, dropout", dense, P),
        _separable("one query, one key", Size(queries=1, height=1, width=1)),
        _separable("one row of cells, dropout", Size(queries=3, height=1, width=70, valid=((1, 65), (1, 3))), 0.3),
        _separable("one column of cells", Size(queries=67, height=37, width=1)),
        _separable("an image that is all padding, dropout", Size(queries=20, valid=((0, 0), (3, 5))), 0.3),
        _dense("an image that is all padding", Size(queries=20, valid=((0, 0), (3, 5)))),
        _separable("no multiples of tiles", Size(1, 70, 9, 11, 3, valid=((8, 10),))),
        _separable("odd widths", Size(queries=9, widths=(20, 24, 40))),
        _separable("with gaps in memory", Size(queries=9, valid=((4, 5), (3, 7))), is_strided=True),
        _self("model, dropout", images, QUERIES, P, is_model=True),
        _self("an image that is all padding", 2, 21, 0.0, is_padded=True),
        _bits("model", images * HEADS * QUERIES * 28, is_model=True),
        _bits("one word", 1),
        _bits("no multiple of a tile", 1031),
    ]


def forms(images: int) -> list[Problem]:
    """Each variant of attention's kernels at the size of the model, for the choice of launch settings."""
    size = Size(images, QUERIES, HEIGHT, WIDTH, HEADS, valid=VALID)
    return [
        make(f"{keys} keys{', dropout' * (p > 0)}, {images} images", size, p)
        for make, keys in ((_separable, "separable"), (_dense, "dense"))
        for p in (0.0, P)
    ]


def _make(size: Size, is_separable: bool, is_strided: bool, maker: Maker) -> Inputs:
    content, spatial, value = size.widths
    keys = size.height * size.width
    shapes = {
        "q_content": (size.queries, content),
        "q_spatial": (size.queries, spatial),
        "k_content": (keys, content),
        "v": (keys, value),
        "rows": (size.height, spatial),
        "columns": (size.width, spatial),
    }
    made = {name: maker.normal(size.images, n, size.heads, d) for name, (n, d) in shapes.items()}
    made["k_spatial"] = dense_spatial_keys(made["rows"], made["columns"])
    if is_strided:
        made = {name: strided(x) for name, x in made.items()}
    made["seed"] = maker.exactly([2**31 - 5], torch.int64)
    if size.valid:
        valid = [size.valid[image % len(size.valid)] for image in range(size.images)]
        made["valid"] = maker.exactly(valid, torch.int32)
        made["padding"] = rectangle_padding(made["valid"], size.height, size.width)
        if not is_separable:
            made["padding"] |= maker.booleans(0.2, size.images, keys)
    return made


def _separable(title: str, size: Size, p: float = 0.0, is_model: bool = False, is_strided: bool = False) -> Problem:
    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        options = {"valid_cells": inputs.get("valid"), "dropout_p": p, "seed": inputs["seed"], "backend": backend}
        keys = (inputs["k_content"], (inputs["rows"], inputs["columns"]), inputs["v"])
        return [conditional_attention(inputs["q_content"], inputs["q_spatial"], *keys, **options)]

    return Problem(
        "conditional_attention",
        title,
        partial(_make, size, True, is_strided),
        run,
        (*CONTENT, "rows", "columns"),
        is_model=is_model,
        dropout=_dropout(size, p, run),
        peers=(Peer(partial(_plain, p), (*CONTENT, "k_spatial")), Peer(partial(_fused, p), (*CONTENT, "k_spatial"))),
    )


def _dense(title: str, size: Size, p: float = 0.0) -> Problem:
    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        options = {"dropout_p": p, "seed": inputs["seed"], "backend": backend}
        keys = (inputs["k_content"], inputs["k_spatial"], inputs["v"])
        queries = (inputs["q_content"], inputs["q_spatial"])
        return [conditional_attention(*queries, *keys, key_padding_mask=inputs["padding"], **options)]

    make = partial(_make, size, False, False)
    names = (*CONTENT, "k_spatial")
    return Problem("conditional_attention", title, make, run, names, dropout=_dropout(size, p, run))


def _dropout(size: Size, p: float, run: Callable[[Inputs, str], list[Tensor]]) -> Dropout | None:
    """Plain PyTorch drops the same weights automatically, given the same seed."""
    if p == 0:
        return None
    shape = bits_shape(size.images, size.heads, size.queries, size.height * size.width)

    def kept(inputs: Inputs, backend: str) -> Tensor:
        return unpacked(dropout_bits(inputs["seed"], shape, p, backend))

    return Dropout(drawn_probability(p), kept, lambda inputs, _: run(inputs, "eager"))


def _plain(p: float, inputs: Inputs) -> list[Tensor]:
    """Attention as in the official code: dense keys, and PyTorch's dropout."""
    names = ("q_content", "q_spatial", "k_content", "k_spatial", "v")
    tensors = [inputs[name] for name in names]
    return [conditional_attention(*tensors, key_padding_mask=inputs.get("padding"), dropout_p=p, backend="eager")]


def _fused(p: float, inputs: Inputs) -> list[Tensor]:
    """PyTorch's own fused attention on concatenated queries and keys."""
    query = torch.cat([inputs["q_content"], inputs["q_spatial"]], -1).transpose(1, 2)
    key = torch.cat([inputs["k_content"], inputs["k_spatial"]], -1).transpose(1, 2)
    mask = None if "padding" not in inputs else ~inputs["padding"][:, None, None, :]
    out = F.scaled_dot_product_attention(query, key, inputs["v"].transpose(1, 2), mask, p)
    return [out.transpose(1, 2)]


def _self(title: str, images: int, tokens: int, p: float, is_padded: bool = False, is_model: bool = False) -> Problem:
    """Self-attention has no spatial parts: the halves of each head's channels serve as content and spatial part."""
    size = Size(images, tokens, 1, tokens, HEADS if is_model else 2)

    def make(maker: Maker) -> Inputs:
        made = {name: maker.normal(images, tokens, size.heads, CHANNELS) for name in ("query", "key", "value")}
        made["seed"] = maker.exactly([2**31 - 5], torch.int64)
        if is_padded:
            made["padding"] = torch.arange(tokens, device=maker.device) >= maker.exactly([[0], [13]], torch.int64)
        return made

    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        halves = [*inputs["query"].chunk(2, -1), *inputs["key"].chunk(2, -1)]
        options = {"dropout_p": p, "seed": inputs["seed"], "backend": backend}
        return [conditional_attention(*halves, inputs["value"], key_padding_mask=inputs.get("padding"), **options)]

    def fused(inputs: Inputs) -> list[Tensor]:
        tensors = [inputs[name].transpose(1, 2) for name in ("query", "key", "value")]
        return [F.scaled_dot_product_attention(*tensors, dropout_p=p).transpose(1, 2)]

    names = ("query", "key", "value")
    peers = (Peer(fused, names),)
    return Problem(
        "self_attention", title, make, run, names, is_model=is_model, dropout=_dropout(size, p, run), peers=peers
    )


def _bits(title: str, words: int, is_model: bool = False) -> Problem:
    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        return [dropout_bits(inputs["seed"], (words,), P, backend)]

    return Problem(
        "dropout_bits",
        title,
        lambda maker: {"seed": maker.exactly([2**31 - 5], torch.int64)},
        run,
        dtypes=(torch.float32,),
        is_model=is_model,
        dropout=Dropout(
            drawn_probability(P),
            lambda inputs, backend: unpacked(run(inputs, backend)[0]),
            lambda inputs, _: run(inputs, "eager"),
        ),
    )
