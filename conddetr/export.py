"""Export to files that run without this package: `torch.export` programs and ONNX.

Both are a function of one tensor:

- input `images` [B, 3, H, W] float32, RGB in [0, 1] minus ImageNet's mean, divided by its standard deviation
  (`conddetr.data.images.prepare` does both, and resizes). Any B; any H and W unless a size was fixed. Batches have no
  padding: images of different sizes are run one by one.
- outputs `logits` [B, Q, K] and `boxes` [B, Q, 4] of the last decoder layer, as `pred_logits` and `pred_boxes` of the
  model; `conddetr.postprocess` computes detections from them.
"""

import copy
import importlib.util
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conddetr.files import atomic_file
from conddetr.model.detr import DETR

OPSET = 18
"""Version of the ONNX operator set, the one that PyTorch's exporter targets."""
TOLERANCE = 1e-4
"""Largest absolute difference of a logit or box that the check accepts."""
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
"""Formats, and the suffixes of their files."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Runner = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class ExportReport:
    """Report of an export and its check."""

    path: Path
    input_shape: str
    """Shape of `images`, with names for free dimensions, and their minimum."""
    checked: list[tuple[int, ...]]
    """Shapes of the batches on which the file was compared with the model."""
    difference: float
    """Largest absolute difference of logits and boxes on these batches."""


def export(
    model: DETR,
    path: str | Path,
    format: str = "onnx",
    size: tuple[int, int] | None = None,
    classes: Sequence[dict[str, Any]] = (),
) -> ExportReport:
    """Write a model to a file and check the file against the model. A file that fails the check is not kept.

    A ResNet's batch norms are folded into its convolutions. The file also holds the classes and the settings of
    preprocessing as JSON: in ONNX as metadata `conddetr`, in a torch file as extra file `conddetr.json`.

    Args:
        model: any preset, any backend, on any device; exported in float32, from plain PyTorch operations.
        path: the file, with a suffix as in `SUFFIXES`. An older file is replaced when the new one is complete.
        format: `torch` (`torch.export.load` reads it) or `onnx` (operator set `OPSET`; needs the packages of
            `pip install 'conddetr[export]'`).
        size: fix the height and width in pixels; default: any, from two cells of the feature map on.
        classes: `id` and `name` of every label.

    Raises:
        ValueError: unknown format, a path with another suffix, or a size below 1; or no size, although this PyTorch
            needs one (2.11 does for a ResNet).
        ImportError: packages for ONNX are missing; the message names them.
        OSError: the file cannot be written.
        FloatingPointError: outputs of the file differ from the model's by more than `TOLERANCE`, or are not finite.
    """
    path = Path(path)
    _check_arguments(path, format, size)
    reference = _plain_copy(model)
    stride = reference.backbone[0].stride
    dimensions = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    example = torch.zeros(2, 3, *(size or (4 * stride, 5 * stride)), dtype=torch.float32)
    program = _trace(_Deployed(reference), example, dimensions, stride)
    save, load = (_save_torch, _load_torch) if format == "torch" else (_save_onnx, _load_onnx)
    # "partial" is a prefix, because readers check the suffix.
    with atomic_file(path, path.with_name("partial-" + path.name)) as partial:
        save(program, partial, dimensions, json.dumps(_description(model, size, classes)))
        shapes = _shapes_to_check(size, stride, model.config.image_size)
        difference = _difference(reference, load(partial), shapes)
    height, width = size or (f"height ≥ {stride + 1}", f"width ≥ {stride + 1}")
    return ExportReport(path, f"[batch, 3, {height}, {width}]", shapes, difference)


def _check_arguments(path: Path, format: str, size: tuple[int, int] | None) -> None:
    if format not in SUFFIXES:
        raise ValueError(f"format: expected one of {', '.join(SUFFIXES)}, got {format!r}.")
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"path: format {format!r} needs a name ending in {SUFFIXES[format]}, got {str(path)!r}.")
    if size is not None and min(size) < 1:
        raise ValueError(f"size: expected a height and width of at least 1, got {tuple(size)}.")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise ImportError(
            f"ONNX export needs {', '.join(missing)}: pip install 'conddetr[export]', or export with format 'torch'."
        )


def _plain_copy(model: DETR) -> DETR:
    """The model on the CPU, in float32, from plain PyTorch operations, and not fused."""
    with torch.no_grad():
        plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    plain.set_backend("eager")
    plain.config = replace(plain.config, aux_loss=False)
    return plain


class _Deployed(nn.Module):
    """A model as a function from a batch to two tensors, its batch norms folded."""

    def __init__(self, model: DETR) -> None:
        super().__init__()
        self.model = model.fused()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(images)
        return output["pred_logits"], output["pred_boxes"]


def _trace(module: nn.Module, example: Tensor, dimensions: dict[int, str], stride: int) -> torch.export.ExportedProgram:
    least = {"batch": 1, "height": stride + 1, "width": stride + 1}
    dims = {axis: torch.export.Dim(name, min=least[name]) for axis, name in dimensions.items()}
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes={"images": dims})
    except torch._dynamo.exc.UserError as error:
        # PyTorch 2.11 restricts max pooling of a free size to even or to odd sizes.
        raise ValueError(
            f"PyTorch {torch.__version__} cannot trace this model for any image size: fix the size with size=(H, W), "
            "on the command line --size H W, or use a newer PyTorch."
        ) from error


def _description(model: DETR, size: tuple[int, int] | None, classes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metadata for programs that run the file."""
    from conddetr.data.images import MEAN, STD

    config = model.config
    return {
        "classes": list(classes),
        "activation": config.activation,
        "mean": MEAN,
        "std": STD,
        "size": size,
        "short_side": config.image_size,
        "max_long_side": config.max_image_size,
        "config": config.to_dict(),
    }


def _save_torch(program: torch.export.ExportedProgram, path: Path, _: dict[int, str], description: str) -> None:
    # Saved to memory first: on a full disk, PyTorch's writer ends the whole process.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"conddetr.json": description})
    path.write_bytes(content.getbuffer())


def _load_torch(path: Path) -> Runner:
    return torch.export.load(path).module()


def _save_onnx(program: torch.export.ExportedProgram, path: Path, dimensions: dict[int, str], description: str) -> None:
    with _quiet_optimizer():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits", "boxes"],
            dynamic_shapes={"images": dimensions},
            verbose=False,
        )
    onnx_program.model.metadata_props["conddetr"] = description
    onnx_program.save(path, external_data=False)


@contextmanager
def _quiet_optimizer() -> Iterator[None]:
    """Silence onnxscript, which warns of every operator that it does not fold; these warnings do not matter."""
    logger = logging.getLogger("onnxscript.optimizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(["logits", "boxes"], {"images": images.numpy()})]

    return run


def _shapes_to_check(size: tuple[int, int] | None, stride: int, image_size: int) -> list[tuple[int, ...]]:
    """Batches of one and of several images; if the size is free, sizes that no tile divides, and the usual one."""
    if size:
        return [(1, 3, *size), (3, 3, *size)]
    return [(1, 3, 2 * stride, 7 * stride + 1), (3, 3, 6 * stride - 1, 4 * stride), (1, 3, image_size, image_size)]


@torch.no_grad()
def _difference(model: DETR, run: Runner, shapes: list[tuple[int, ...]]) -> float:
    """Largest absolute difference of logits and boxes between model and file, on noise images of these shapes."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in shapes:
        images = torch.randn(shape, generator=generator, dtype=torch.float32)
        expected = model(images)
        for name, actual in zip(("pred_logits", "pred_boxes"), run(images), strict=True):
            difference = float((actual - expected[name]).abs().max())
            # Not `difference > TOLERANCE`, which is false for NaN.
            if not difference <= TOLERANCE:
                raise FloatingPointError(
                    f"The exported {name} differ from the model's by {difference:.3g} on images of shape {shape}, "
                    f"at most {TOLERANCE:g} is allowed; nothing was written."
                )
            largest = max(largest, difference)
    return largest
