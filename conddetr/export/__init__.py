"""Export to files that run without this package: `torch.export` programs and ONNX.

Both are functions of tensors:

- input `images` [B, 3, H, W] float32, RGB in [0, 1] minus ImageNet's mean, divided by its standard deviation
  (`conddetr.data.images.prepare` does both, and resizes). Any B; any H and W unless a size was fixed. Batches have no
  padding: images of different sizes are run one by one.
- outputs `logits` [B, Q, K] and `boxes` [B, Q, 4] of the last decoder layer, as `pred_logits` and `pred_boxes` of the
  model; `conddetr.postprocess` computes detections from them.

With post-processing inside, there is a second input, and the outputs are detections in pixels:

- input `sizes` [B, 2] int64: height and width of the original images.
- outputs `scores` [B, k] float32, best first, `labels` [B, k] int64, positions in the list of classes, and `boxes`
  [B, k, 4] float32, x1, y1, x2, y2.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from conddetr.export import files
from conddetr.export.check import Tolerance, check, shapes_to_check
from conddetr.export.graph import DETECTIONS, RAW, Deployed, description, plain_copy, trace
from conddetr.files import atomic_file
from conddetr.model.detr import DETR

OPSET = files.OPSET
TOLERANCES = {"float32": Tolerance(1e-4, 1e-4), "float16": Tolerance(5e-2, 1e-2)}
"""Precision → the differences from the float32 model that the check accepts."""
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
"""Formats, and the suffixes of their files."""


@dataclass(frozen=True)
class ExportReport:
    """Report of an export and its check."""

    path: Path
    input_shape: str
    """Shape of `images`, with names for free dimensions, and their minimum."""
    checked: list[tuple[int, ...]]
    """Shapes of the batches on which the file was compared with the model."""
    difference: float
    """Largest absolute difference of the outputs on these batches; of detections: of scores, and of boxes in fractions
    of the image."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    runtimes: tuple[str, ...]
    """Programs that ran the file for the check."""


def export(
    model: DETR,
    path: str | Path,
    format: str = "onnx",
    size: tuple[int, int] | None = None,
    classes: Sequence[dict[str, Any]] = (),
    *,
    postprocess: bool = False,
    top_k: int = 100,
    precision: Literal["float32", "float16"] = "float32",
    check_with: Literal["", "openvino"] = "",
) -> ExportReport:
    """Write a model to a file and check the file against the model. A file that fails the check is not kept.

    A ResNet's batch norms are folded into its convolutions. The file also holds the classes, the settings of
    preprocessing and the meaning of inputs and outputs as JSON: in ONNX as metadata `conddetr`, in a torch file as
    extra file `conddetr.json`.

    Args:
        model: any preset, any backend, on any device; exported from plain PyTorch operations.
        path: the file, with a suffix as in `SUFFIXES`. An older file is replaced when the new one is complete.
        format: `torch` (`torch.export.load` reads it) or `onnx` (operator set `OPSET`; needs the packages of
            `pip install 'conddetr[export]'`).
        size: fix the height and width in pixels; default: any, from two cells of the feature map on.
        classes: `id` and `name` of every label.
        postprocess: the file returns detections, not logits.
        top_k: number of detections per image with `postprocess`; fewer if there are fewer candidates.
        precision: `float16`: weights of convolutions and linear layers, and what they compute, are float16, as under
            autocast. Heads, norms, reference points, inputs and outputs are float32.
        check_with: `openvino`: also run the ONNX file with OpenVINO and compare it (`pip install
            'conddetr[openvino]'`).

    Raises:
        ValueError: unknown format, precision or runtime, a path with another suffix, or a size or `top_k` below 1; or
            no size, although this PyTorch needs one (2.11 does for a ResNet).
        ImportError: packages for ONNX or OpenVINO are missing; the message names them.
        OSError: the file cannot be written.
        FloatingPointError: outputs of the file differ from the model's by more than `TOLERANCES`, or are not finite.
    """
    path = Path(path)
    _check_arguments(path, format, size, top_k, precision, check_with)
    detections = top_k if postprocess else None
    reference = plain_copy(model)
    stride = cast(int, reference.backbone[0].stride)
    free = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    examples = [torch.zeros(2, 3, *(size or (4 * stride, 5 * stride)), dtype=torch.float32)]
    shapes = {"images": free}
    if postprocess:
        examples.append(torch.full((2, 2), 100))
        shapes["sizes"] = {0: "batch"}
    interface = files.Interface(shapes, DETECTIONS if postprocess else RAW)
    program = trace(Deployed(reference, precision, detections), tuple(examples), shapes, stride)
    text = json.dumps(description(model, size, classes, precision, detections))
    save = files.save_torch if format == "torch" else files.save_onnx
    runtimes = _runtimes(format, check_with)
    # "partial" is a prefix, because readers check the suffix.
    with atomic_file(path, path.with_name("partial-" + path.name)) as partial:
        save(program, partial, interface, text)
        checked = shapes_to_check(size, stride, model.config.image_size)
        tolerance = TOLERANCES[precision]
        difference = max(
            check(reference, load(partial, interface), checked, tolerance, detections, name)
            for name, load in runtimes.items()
        )
    height, width = size or (f"height ≥ {stride + 1}", f"width ≥ {stride + 1}")
    shape = f"[batch, 3, {height}, {width}]"
    return ExportReport(path, shape, checked, difference, tuple(shapes), interface.outputs, tuple(runtimes))


def _runtimes(format: str, check_with: str) -> dict[str, files.Loader]:
    """Name and loader of each runtime that checks the file."""
    if format == "torch":
        return {"PyTorch": files.load_torch}
    runtimes: dict[str, files.Loader] = {"onnxruntime": files.load_onnx}
    if check_with == "openvino":
        runtimes["OpenVINO"] = files.load_openvino
    return runtimes


def _check_arguments(
    path: Path, format: str, size: tuple[int, int] | None, top_k: int, precision: str, check_with: str
) -> None:
    for name, value, known in (
        ("format", format, SUFFIXES),
        ("precision", precision, TOLERANCES),
        ("check_with", check_with, ("", "openvino")),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(filter(None, known))}, got {value!r}.")
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"path: format {format!r} needs a name ending in {SUFFIXES[format]}, got {str(path)!r}.")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: expected a height and width of at least 1, got {tuple(size)}.")
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}.")
    if check_with and format != "onnx":
        raise ValueError(f"check_with: OpenVINO reads ONNX files, got format {format!r}.")
    missing = files.missing_packages(format)
    if missing:
        raise ImportError(
            f"ONNX export needs {', '.join(missing)}: pip install 'conddetr[export]', or export with format 'torch'."
        )
    if check_with and files.missing_packages(check_with):
        raise ImportError(f"The check with {check_with} needs it: pip install 'conddetr[{check_with}]'.")
