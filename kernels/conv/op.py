"""Convolution with bias, residual sum and ReLU: the public functions and their checks.

They only choose among operators. On a CPU, 3×3 convolutions run on our Winograd kernel (`cpu/conv3x3`), the others on
oneDNN, which fuses bias, residual add and ReLU; gradients of weights come from matrix products (`pytorch.py`). On GPUs
convolutions run on cuDNN (`gpu.py`).
"""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from conddetr.kernels import paths, registry
from conddetr.kernels.conv import gpu, pytorch
from conddetr.kernels.cpu import conv3x3

UNIT = ((1, 1), (1, 1), (1, 1), 1)
"""Stride, padding, dilation and groups of a 3×3 convolution that keeps the size of a map."""


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    overwrite: bool = False,
    relu: bool = False,
    uses: int = 1,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A convolution with the bias, residual add and ReLU of a residual network: relu(x * weight + bias + residual).

    Args:
        x: [B, Cin, H, W], floating; fastest in channels-last, which the result then has too.
        weight: [Cout, Cin / groups, kh, kw] of the dtype and device of x.
        bias: [Cout], likewise.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, vertical and horizontal.
        residual: of the shape of the result.
        overwrite: the residual is not needed afterwards: the result may take its memory, which saves an allocation.
        relu: apply ReLU at the end.
        uses: how often the result will be used, 1 or 2. With 2 it is returned twice without a copy, and on GPUs the
            kernel that reads the gradients of both uses sums them too.
        backend: `eager`: PyTorch's operators; those of oneDNN fuse bias, residual and ReLU if no gradient is recorded.
            `native`: `convolution_3x3`; raises an error for other convolutions. `triton`: PyTorch's convolution, one
            kernel for bias, residual and ReLU (which is required), and one for ReLU's backward and the sum of
            gradients. `auto`: the fastest. On CPUs it also computes the gradient of weights by matrix products. On GPUs
            it uses cuDNN's operators with bias, residual and ReLU in one pass, and `triton` where these cannot run.
            They are tried once on a small map for each device, dtype and kind of convolution, which waits for the
            device.

    Returns:
        [B, Cout, h, w], or a pair of it with `uses` 2. Gradients of any order are recorded.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    window = (stride, padding, dilation, groups)
    _check(x, weight, bias, window, residual)
    if uses not in (1, 2):
        raise ValueError(f"uses: expected 1 or 2, got {uses}.")
    choice = OPERATION.choose(backend, x.device, x.dtype, x, weight, bias, residual, relu, window)
    if choice.backend == "triton":
        return gpu.convolution(backend, x, weight, bias, window, residual, uses)
    if choice.backend == "native":
        paths.note("convolution", "native")
        out = conv3x3.convolution_3x3(x, weight, bias, relu=relu and residual is None, backend="native")
        out = out if residual is None else pytorch.add(out, residual, relu)
    else:
        by_products = backend != "eager" and groups == 1
        out = pytorch.convolution(x, weight, bias, window, residual, overwrite, relu, by_products, choice.refused)
    return out if uses == 1 else (out, out)


class Layer(NamedTuple):
    """A convolution; fields as in `convolution`."""

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def convolution_pair(x: Tensor, first: Layer, second: Layer, *, backend: str = "auto") -> Tensor:
    """Two convolutions with ReLU: relu(second(relu(first(x)))).

    On GPUs the map between them is not saved but recomputed in backward, by one launch. This pays if the map is large,
    as it is if the second convolution has a stride.

    Args:
        x: [B, C, H, W], floating.
        first, second: the two convolutions.
        backend: as in `convolution`.

    Returns:
        The result of the second convolution. Gradients of any order are recorded.

    Raises:
        ValueError, RuntimeError: as in `convolution`.
    """
    layers = (first, second)
    is_recorded = pytorch.records_gradients([tensor for tensor in (x, *first[:2], *second[:2]) if tensor is not None])
    if is_recorded and (backend == "triton" or (backend == "auto" and x.is_cuda)):
        _check(x, *first[:2], first[2:], None)
        # The map between has the first weight's output channels; its size does not matter to the check.
        _check(x[:, :1].expand(-1, len(first.weight), -1, -1), *second[:2], second[2:], None)
        if all(_chosen(backend, x, layer) == "triton" for layer in layers):
            return gpu.convolution_pair(backend, x, tuple((*layer[:2], tuple(layer[2:])) for layer in layers))
    for weight, bias, stride, padding, dilation, groups in layers:
        window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        x = convolution(x, weight, bias, **window, relu=True, backend=backend)
    return x


def _chosen(backend: str, x: Tensor, layer: Layer) -> str:
    return OPERATION.prefer(backend, x.device, x.dtype, x, *layer[:2], None, True, tuple(layer[2:])).backend


def _why_not_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, window: tuple
) -> str | None:
    if window == UNIT and tuple(weight.shape[2:]) == (3, 3):
        return conv3x3.why_not(tuple(weight.shape[:2]), x.shape)
    return (
        f"its kernel takes a window of 3×3, stride, padding, dilation and groups 1, got {tuple(weight.shape[2:])} and "
        f"{window}: use backend auto or eager."
    )


def _why_not_plain(x: Tensor, weight: Tensor, *_: object) -> str | None:
    return None if pytorch.is_plain([x, weight]) else "x or weight will be cast, traced or differentiated by PyTorch."


OPERATION = registry.declare(
    "convolution",
    triton=registry.Kernels(why_not=gpu.why_not),
    native=dataclasses.replace(conv3x3.KERNELS, why_not=_why_not_native, why_not_auto=_why_not_plain),
)
"""`why_not` takes x, weight, bias, residual, ReLU and the window: stride, padding, dilation and groups."""


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, window: tuple, residual: Tensor | None) -> None:
    """Checks with clearer messages than PyTorch's own."""
    if weight.dim() != 4:
        raise ValueError(f"weight: expected [Cout, Cin / groups, kh, kw], got {tuple(weight.shape)}.")
    stride, padding, dilation, groups = window
    channels = weight.shape[1] * groups
    if x.dim() != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(f"x: expected [B, {channels}, H, W] like weight, floating, got {tuple(x.shape)} {x.dtype}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected {tuple(weight.shape[:1])} like weight, got {tuple(bias.shape)}.")
    if residual is None:
        return
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    cells = [(size + 2 * pad - gap * (width - 1) - 1) // step + 1 for size, width, step, pad, gap in sizes]
    expected = (x.shape[0], weight.shape[0], *cells)
    if tuple(residual.shape) != expected:
        raise ValueError(f"residual: expected {expected} like the result, got {tuple(residual.shape)}.")
