"""Checkpoint files: written atomically and in the background, read without unpickling code.

A run's folder holds `checkpoint.pt`, the state after the latest save; `checkpoint.previous.pt`, the one before it;
`best.pt`, the weights of the best evaluation; and `epoch-N.pt` if requested. The weights of `checkpoint.pt` and
`best.pt` are also written beside them as `.safetensors`.

`torch.load` reads all `.pt` files. `best.pt` is a dict with the weights under "model". In the others, tensors are
packed by dtype, with a checksum of everything; `read_checkpoint` returns the tensors by name.
"""

import hashlib
import json
import logging
import math
import os
import pickle
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conddetr.engine import distributed, unpickle
from conddetr.files import atomic_file, flush

log = logging.getLogger(__name__)

LATEST = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
BEST = "best.pt"
DAMAGED = ".damaged"
"""Suffix that a damaged `checkpoint.pt` gets when a run resumes from the previous one."""
METADATA = ("config", "classes", "run", "metrics")
"""Metadata of a `.safetensors` file: the model's configuration and its classes; for weights of a run also the whole
configuration of the run and the metrics of its last evaluation."""
FORMAT = "conddetr checkpoint 2"
NICENESS = 5
"""How much lower the writer thread's priority is than that of the other threads, on a scale of 40."""
UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ValueError,
    pickle.UnpicklingError,
    SafetensorError,
)
"""Exceptions that the libraries raise for damaged files."""


class Packed:
    """A copy of nested dicts and lists in host memory. Tensors lie one after the other in a flat tensor per dtype.

    Python pickles tensors one by one and lets no other thread run meanwhile. A run has a thousand tensors, so training
    would wait. A few big tensors are written without blocking Python.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Copy `content`. Copies from a GPU may arrive later; `unpack` and `write` wait for them."""
        tensors: list[tuple[tuple, Tensor]] = []
        self.plain = _without_tensors(content, (), tensors)
        self._signature = _signature(tensors)
        self.layout = [
            (path, str(dtype).removeprefix("torch."), tuple(shape)) for path, dtype, shape in self._signature
        ]
        sizes: dict[str, int] = {}
        for _, dtype, shape in self.layout:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        self._gpu = next((tensor.device for _, tensor in tensors if tensor.is_cuda), None)
        self.flat = {
            dtype: torch.empty(size, dtype=getattr(torch, dtype), pin_memory=self._gpu is not None)
            for dtype, size in sizes.items()
        }
        self._views = _views(self.layout, self.flat)
        self._copy(tensors)

    def refill(self, content: Mapping[str, Any]) -> bool:
        """Copy `content` into the same memory. Returns False, and copies nothing, if names, dtypes or shapes differ.

        Allocating memory for every checkpoint would take longer than the copy.
        """
        tensors: list[tuple[tuple, Tensor]] = []
        plain = _without_tensors(content, (), tensors)
        if _signature(tensors) != self._signature:
            return False
        self.plain = plain
        self._copy(tensors)
        return True

    @torch.no_grad()
    def _copy(self, tensors: list[tuple[tuple, Tensor]]) -> None:
        if tensors:
            torch._foreach_copy_(self._views, [tensor for _, tensor in tensors], non_blocking=True)
        # On a GPU the copies are queued before the next update of the weights, so training need not wait for them.
        self._arrived = torch.cuda.current_stream(self._gpu).record_event() if self._gpu else None

    def _wait(self) -> None:
        arrived, self._arrived = self._arrived, None
        if arrived is not None:
            arrived.synchronize()

    def unpack(self) -> dict[str, Any]:
        """The nested content; its tensors are views of the flat tensors."""
        self._wait()
        return _with_tensors(self.plain, self.layout, self._views)

    def write(self, path: Path) -> None:
        """Write a file for `torch.load`."""
        self._wait()
        layout = json.dumps(self.layout)
        checksum = _checksum(self.plain, layout, self.flat)
        content = {
            "format": FORMAT,
            "checksum": checksum,
            "plain": self.plain,
            "layout": layout,
            "tensors": self.flat,
        }
        torch.save(content, path)


def _checksum(plain: Any, layout: str, flat: dict[str, Tensor]) -> str:
    """Checksum of a checkpoint's content. The file formats do not verify it: a flipped bit would go unnoticed."""
    digest = hashlib.blake2b(repr((plain, layout, list(flat))).encode())
    for tensor in flat.values():
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _unpacked(content: dict[str, Any]) -> dict[str, Any]:
    """The content that `Packed.write` wrote, by name; raises a ValueError if the checksum does not match."""
    plain, layout, flat = (content[key] for key in ("plain", "layout", "tensors"))
    if _checksum(plain, layout, flat) != content["checksum"]:
        raise ValueError("the checksum does not match the content")
    layout = json.loads(layout)
    # Copies, because a view would keep the whole flat tensor in memory.
    return _with_tensors(plain, layout, [view.clone() for view in _views(layout, flat)])


def _without_tensors(value: Any, path: tuple, tensors: list[tuple[tuple, Tensor]]) -> Any:
    """The same structure with None for every tensor; appends (path, tensor) to `tensors`, keys from the outermost."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return value
    plain = {}
    # No function call per tensor: there are a thousand, and training waits for this.
    for key, item in items:
        if isinstance(item, Tensor):
            tensors.append(((*path, key), item))
            item = None
        elif isinstance(item, (dict, list, tuple)):
            item = _without_tensors(item, (*path, key), tensors)
        plain[key] = item
    return plain if isinstance(value, dict) else list(plain.values())


def _with_tensors(plain: Any, layout: list, tensors: list[Tensor]) -> Any:
    """A copy of the result of `_without_tensors` with the tensors put back."""
    content = _without_tensors(plain, (), [])
    for (path, _, _), tensor in zip(layout, tensors, strict=True):
        container = content
        for key in path[:-1]:
            container = container[key]
        container[path[-1]] = tensor
    return content


def _signature(tensors: list[tuple[tuple, Tensor]]) -> list[tuple[tuple, torch.dtype, torch.Size]]:
    """Keys, dtype and shape of every tensor."""
    return [(path, tensor.dtype, tensor.shape) for path, tensor in tensors]


def _views(layout: list, flat: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of a layout as views of the flat tensors."""
    offsets, views = dict.fromkeys(flat, 0), []
    for _, dtype, shape in layout:
        start = offsets[dtype]
        offsets[dtype] = start + math.prod(shape)
        views.append(flat[dtype][start : offsets[dtype]].view(shape))
    return views


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write nested dicts for `torch.load`. `path` holds either the old file or the complete new one."""
    with atomic_file(Path(path)) as partial:
        torch.save(dict(content), partial)


def save_latest(folder: Path, packed: Packed) -> None:
    """Write `checkpoint.pt`; the earlier one becomes `checkpoint.previous.pt`."""
    with atomic_file(folder / LATEST) as partial:
        packed.write(partial)
        # Before the old file is moved, because a full disk may be reported only here.
        flush(partial)
        if (folder / LATEST).exists():
            os.replace(folder / LATEST, folder / PREVIOUS)


def save_run(folder: Path, packed: Packed, epoch: int, is_best: bool, keep: bool) -> None:
    """Write the state of a run into its folder.

    Args:
        folder: the run's folder.
        packed: the content of `checkpoint.pt`.
        epoch: number of finished epochs, at the end of one; 0: inside an epoch, then only `checkpoint.pt` is written.
        is_best: also write `best.pt`.
        keep: also write `epoch-N.pt`.
    """
    if epoch:
        content = packed.unpack()
        weights = {key: content[key] for key in ("config", "classes", "metrics", "run")}
        # The moving average was evaluated. Copies, because a file of views would hold the whole flat tensors.
        weights["model"] = {name: value.clone() for name, value in (content["ema"] or content["model"]).items()}
        save_weights((folder / LATEST).with_suffix(".safetensors"), weights)
        if is_best:
            save_checkpoint(folder / BEST, weights)
            save_weights((folder / BEST).with_suffix(".safetensors"), weights)
        if keep:
            with atomic_file(folder / f"epoch-{epoch:04}.pt") as partial:
                packed.write(partial)
    # Last, because it implies that the others exist. A run killed before this writes them again when it resumes.
    save_latest(folder, packed)


def save_weights(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write the weights of a checkpoint as safetensors, and the keys in `METADATA` as JSON in the file's metadata."""
    metadata = {"format": "pt", **{key: json.dumps(content[key]) for key in METADATA if key in content}}
    # The library refuses tensors that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in content["model"].items()
    }
    with atomic_file(Path(path)) as partial:
        save_file(tensors, partial, metadata)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or a `.safetensors` file to the CPU. `conddetr.engine.unpickle` runs no code from it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not a checkpoint, or a pickle of objects that are not data; names the file and the object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        content = unpickle.load(path)
        if isinstance(content, dict) and content.get("format") == FORMAT:
            return _unpacked(content)
    except unpickle.ForbiddenObjectError as error:
        raise ValueError(
            f"Checkpoint {path} cannot be read: damaged, or it holds {error}, which is neither a tensor nor plain "
            "data; code in a pickle is never run here. Save the weights alone in the program that wrote it: "
            "torch.save(model.state_dict(), file)."
        ) from error
    except UNREADABLE as error:
        raise ValueError(
            f"Checkpoint {path} cannot be read: damaged, or not a checkpoint of tensors and plain values "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {path}: expected a dict, got {type(content).__name__}.")
    if "format" in content:
        raise ValueError(
            f"Checkpoint {path}: expected format {FORMAT!r}, got {content['format']!r}. Read it with the version of "
            "conddetr that wrote it."
        )
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    content.update({key: json.loads(metadata[key]) for key in METADATA if key in metadata})
    return content


def read_latest(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint. If a run's `checkpoint.pt` is damaged or missing, warn and read the previous one.

    The damaged file is renamed to `checkpoint.pt.damaged`; otherwise the next save would move it over the previous one.

    Returns:
        The path that was read, and its content.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint` for `path`, if neither can be read.
    """
    path = Path(path)
    try:
        return path, read_checkpoint(path)
    except (ValueError, FileNotFoundError) as error:
        previous = path.with_name(PREVIOUS)
        if path.name != LATEST or not previous.is_file():
            raise
        content = read_checkpoint(previous)
        damaged = path.with_name(path.name + DAMAGED)
        renamed = ""
        # Other processes may be reading it; they see it either damaged or missing.
        if distributed.is_main() and path.is_file():
            os.replace(path, damaged)
            renamed = f" The damaged file is now {damaged}."
        log.warning("%s Resuming from %s instead.%s", error, previous, renamed)
        return previous, content


def has_run(folder: str | Path) -> bool:
    """Whether a folder holds the checkpoint of a run."""
    return any((Path(folder) / name).exists() for name in (LATEST, PREVIOUS))


class CheckpointWriter:
    """Writes in a background thread, one job after the other, while training continues.

    A context manager: at the end it waits for the last job. A job's error is raised by the next call, or at the end.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint", _lower_priority)
        self._pending: Future | None = None
        self._packed: Packed | None = None

    def submit(self, job: Callable[[Packed], None], content: Mapping[str, Any]) -> None:
        """Copy `content` to host memory now, and call `job` with the copy in the thread."""
        self.wait()
        if self._packed is None or not self._packed.refill(content):
            self._packed = Packed(content)
        self._pending = self._thread.submit(job, self._packed)

    @property
    def is_writing(self) -> bool:
        """Whether a job is still running."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait until everything is written; raises the job's error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self.wait()


def _lower_priority() -> None:
    """Give the calling thread a third of the scheduling weight of others: training on a CPU uses every core.

    Not less, because training waits for it before the next save. At the lowest priority, a seventieth of the weight,
    other programs on the same cores would starve both.
    """
    if sys.platform == "linux":
        # Only Linux has a priority per thread.
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
