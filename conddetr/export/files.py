"""Writing exported programs to files, and running these files."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

OPSET = 18
"""Version of the ONNX operator set that PyTorch's exporter targets."""
PACKAGES = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
"""Format or runtime → packages that it needs."""

Runner = Callable[..., Sequence[Tensor]]
"""Takes the inputs in order, returns the outputs in order."""


class Interface(NamedTuple):
    """Names of a file's inputs and outputs."""

    shapes: dict[str, dict[int, str]]
    """Input → axis → name of a free dimension."""
    outputs: tuple[str, ...]


Loader = Callable[[Path, Interface], Runner]
"""Prepares a file to be run."""


def missing_packages(name: str) -> list[str]:
    """Packages that a format or runtime needs and that are not installed."""
    return [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]


def save_torch(program: torch.export.ExportedProgram, path: Path, _: Interface, description: str) -> None:
    """Write a `.pt2` file."""
    # Saved to memory first: on a full disk, PyTorch's writer ends the whole process.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"conddetr.json": description})
    path.write_bytes(content.getbuffer())


def load_torch(path: Path, _: Interface) -> Runner:
    """Run a `.pt2` file with PyTorch."""
    return torch.export.load(path).module()


def save_onnx(program: torch.export.ExportedProgram, path: Path, interface: Interface, description: str) -> None:
    """Write an `.onnx` file."""
    with _quiet_optimizer():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(interface.shapes),
            output_names=list(interface.outputs),
            dynamic_shapes=interface.shapes,
            verbose=False,
        )
    assert onnx_program is not None, "only the old exporter returns None"
    onnx_program.model.metadata_props["conddetr"] = description
    onnx_program.save(path, external_data=False)


@contextmanager
def _quiet_optimizer() -> Iterator[None]:
    """Silence onnxscript, which warns of every operator that it does not fold, and PyTorch's exporter, which warns that
    two inputs share a dimension; these warnings do not matter.
    """
    logger = logging.getLogger("onnxscript.optimizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="# The axis name")
            yield
    finally:
        logger.setLevel(level)


def load_onnx(path: Path, interface: Interface) -> Runner:
    """Run an `.onnx` file with onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Errors only: it warns of every float16 operator without a kernel for CPUs, before which it inserts a cast.
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(interface.shapes, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(list(interface.outputs), feed)]

    return run


def load_openvino(path: Path, interface: Interface) -> Runner:
    """Run an `.onnx` file with OpenVINO on the CPU."""
    import openvino

    # Otherwise it computes in bfloat16 where the CPU can.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(interface.shapes, inputs, strict=True)}
        results = compiled(feed)
        return [torch.from_numpy(results[name].copy()) for name in interface.outputs]

    return run
