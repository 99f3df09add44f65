"""Problems of convolutions: maps of a ResNet-50's stages, channels-last as in the model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels.check.inputs import Inputs, Maker, channels_last, strided
from conddetr.kernels.check.problem import Problem
from conddetr.kernels.conv import Layer, convolution, convolution_pair
from conddetr.kernels.cpu.conv3x3 import convolution_3x3, convolution_3x3_weight_gradient

Size = tuple[int, int, int, int, int]
"""Images, input channels, output channels, height and width."""
WINOGRAD = {"weight": 10.0, "result": 10.0}
"""Allowances of the Winograd weight gradient, whose transforms of 36 numbers round more than products do."""


def problems(images: int) -> list[Problem]:
    """All problems of convolutions: few images and small maps, because PyTorch's float64 convolutions are slow."""
    few = max(1, images // 4)
    model = {"stage 2": (few, 128, 128, 50, 67), "stage 4": (few, 512, 512, 13, 17)}
    odd = {"one cell": (1, 32, 32, 1, 1), "one row of cells": (1, 64, 32, 1, 9), "no multiples": (2, 96, 64, 9, 13)}
    result = []
    for title, size in (model | odd).items():
        is_model = title in model
        result += [
            _unit(title, size, is_model=is_model),
            _weight_gradient(title, size, is_model=is_model),
            _convolution(f"3×3, {title}", size, 3, 1, has_residual=not is_model, is_model=is_model),
        ]
    return [
        *result,
        _unit("with gaps in memory", (2, 32, 64, 6, 7), is_strided=True),
        _convolution("1×1, residual, stage 4", (few, 256, 1024, 25, 34), 1, 1, has_residual=True, is_model=True),
        _convolution("3×3, strided", (few, 64, 64, 31, 33), 3, 2),
        _convolution("7×7, strided", (2, 3, 33, 31, 29), 7, 2, has_residual=True),
        _pair("pair, stage 3", (few, 128, 64, 50, 66), is_model=True),
        _pair("pair, no multiples", (2, 20, 12, 9, 11)),
    ]


def _make(size: Size, kernel: int, maker: Maker) -> Inputs:
    images, in_channels, out_channels, height, width = size
    weight = maker.normal(out_channels, in_channels, kernel, kernel, scale=(in_channels * kernel**2) ** -0.5)
    x = maker.normal(images, in_channels, height, width).relu()
    return {"x": channels_last(x), "weight": channels_last(weight), "bias": maker.normal(out_channels)}


def _unit(title: str, size: Size, is_strided: bool = False, is_model: bool = False) -> Problem:
    def make(maker: Maker) -> Inputs:
        made = _make(size, 3, maker)
        return {**made, "x": strided(made["x"])} if is_strided else made

    return Problem(
        "convolution_3x3",
        title,
        make,
        lambda inputs, backend: [convolution_3x3(inputs["x"], inputs["weight"], inputs["bias"], backend=backend)],
        ("x", "weight", "bias"),
        is_model=is_model,
        allowances={"weight": WINOGRAD["weight"]},
    )


def _weight_gradient(title: str, size: Size, is_model: bool = False) -> Problem:
    def make(maker: Maker) -> Inputs:
        images, _, out_channels, height, width = size
        made = _make(size, 3, maker)
        return {"x": made["x"], "grad": channels_last(maker.normal(images, out_channels, height, width))}

    return Problem(
        "convolution_3x3_weight_gradient",
        title,
        make,
        lambda inputs, backend: [convolution_3x3_weight_gradient(inputs["x"], inputs["grad"], backend=backend)],
        is_model=is_model,
        allowances={"result": WINOGRAD["result"]},
    )


def _convolution(
    title: str, size: Size, kernel: int, stride: int, has_residual: bool = False, is_model: bool = False
) -> Problem:
    window = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
    out_channels, cells = size[2], [(n + 2 * (kernel // 2) - kernel) // stride + 1 for n in size[3:]]

    def make(maker: Maker) -> Inputs:
        made = _make(size, kernel, maker)
        if has_residual:
            made["residual"] = channels_last(maker.normal(size[0], out_channels, *cells).relu())
        return made

    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        tensors = (inputs["x"], inputs["weight"], inputs["bias"])
        options = {"residual": inputs.get("residual"), "relu": True, "backend": backend}
        return [convolution(*tensors, **window, **options)]

    def before_relu(inputs: Inputs) -> list[Tensor]:
        return [_bare(inputs["x"], inputs["weight"], inputs["bias"], window) + inputs.get("residual", 0)]

    return Problem(
        "convolution",
        title,
        make,
        run,
        ("x", "weight", "bias", *(("residual",) if has_residual else ())),
        is_model=is_model,
        jump=before_relu,
        allowances={"weight": WINOGRAD["weight"]} if (kernel, stride) == (3, 1) else {},
    )


def _pair(title: str, size: Size, is_model: bool = False) -> Problem:
    """A 1×1 and a strided 3×3 convolution, which `convolution_pair` fuses. It is chosen like a single convolution."""
    window = {"stride": (2, 2), "padding": (1, 1)}

    def make(maker: Maker) -> Inputs:
        images, _, out_channels, height, width = size
        first = _make(size, 1, maker)
        # One sign for each whole channel keeps the values far from ReLU's kink.
        sign = (1.0 - 2.0 * (torch.arange(out_channels, device=maker.device) % 3 == 1)).to(maker.dtype)
        second = _make((images, out_channels, out_channels, height, width), 3, maker)
        return {
            "x": first["x"],
            "weight": channels_last(first["weight"].abs() * sign[:, None, None, None]),
            "bias": (1 + first["bias"].abs()) * sign,
            "other_weight": second["weight"],
            "other_bias": second["bias"],
        }

    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        layers = Layer(inputs["weight"], inputs["bias"]), Layer(inputs["other_weight"], inputs["other_bias"], **window)
        return [convolution_pair(inputs["x"], *layers, backend=backend)]

    def before_relu(inputs: Inputs) -> list[Tensor]:
        middle = F.conv2d(inputs["x"], inputs["weight"], inputs["bias"]).relu()
        return [_bare(middle, inputs["other_weight"], inputs["other_bias"], window)]

    names = ("x", "weight", "bias", "other_weight", "other_bias")
    return Problem("convolution", title, make, run, names, is_model=is_model, jump=before_relu)


def _bare(x: Tensor, weight: Tensor, bias: Tensor, window: dict[str, tuple[int, int]]) -> Tensor:
    return F.conv2d(x, weight, bias, **window)
