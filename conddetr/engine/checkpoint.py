"""Checkpoint files: written atomically and in the background, read without unpickling code.

A run's folder holds `checkpoint.pt`, the state after the latest save; `checkpoint.previous.pt`, the one before it;
`best.pt`, the weights of the best evaluation; and `epoch-N.pt` where asked for. The weights of `checkpoint.pt` and
`best.pt` stand beside them as `.safetensors`.

All `.pt` files are for `torch.load`. That of `best.pt` is a dict with the weights under "model"; the others have all
tensors of one dtype in a flat one and a checksum of everything, and `read_checkpoint` returns them by name.
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
"""Ending of the name that a damaged `checkpoint.pt` gets when a run goes on from the one before it."""
METADATA = ("config", "classes", "run", "metrics")
"""What stands beside the weights in a `.safetensors` file: the model's configuration, its classes, and where the
weights are of a run, its whole configuration and the numbers of its last evaluation."""
FORMAT = "conddetr checkpoint 2"
NICENESS = 5
"""How much lower the priority of the thread that writes is than that of the others, on a scale of 40."""
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
"""What the libraries raise for a file that is damaged."""


class Packed:
    """A copy in host memory of nested dicts and lists, their tensors one after the other in a flat one per dtype.

    Tensors are pickled one by one in Python, during which no other thread runs; a run has a thousand, and training
    would wait. Few big ones are written without Python.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Copy `content`; the copies of tensors on a GPU may arrive later, which `unpack` and `write` wait for."""
        found: list[tuple[tuple, Tensor]] = []
        self.plain = _without_tensors(content, (), found)
        self._kinds = _kinds(found)
        self.layout = [(path, str(dtype).removeprefix("torch."), tuple(shape)) for path, dtype, shape in self._kinds]
        sizes: dict[str, int] = {}
        for _, dtype, shape in self.layout:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        self._gpu = next((tensor.device for _, tensor in found if tensor.is_cuda), None)
        self.flat = {
            dtype: torch.empty(size, dtype=getattr(torch, dtype), pin_memory=self._gpu is not None)
            for dtype, size in sizes.items()
        }
        self._views = _views(self.layout, self.flat)
        self._copy(found)

    def refill(self, content: Mapping[str, Any]) -> bool:
        """Copy `content` into the same memory; False, and nothing done, if its tensors are others.

        New memory for every checkpoint would take longer than the copy.
        """
        found: list[tuple[tuple, Tensor]] = []
        plain = _without_tensors(content, (), found)
        if _kinds(found) != self._kinds:
            return False
        self.plain = plain
        self._copy(found)
        return True

    @torch.no_grad()
    def _copy(self, found: list[tuple[tuple, Tensor]]) -> None:
        if found:
            torch._foreach_copy_(self._views, [tensor for _, tensor in found], non_blocking=True)
        # On a GPU the copies are queued before whatever changes the weights next: training need not wait for them.
        self._arrived = torch.cuda.current_stream(self._gpu).record_event() if self._gpu else None

    def _wait(self) -> None:
        arrived, self._arrived = self._arrived, None
        if arrived is not None:
            arrived.synchronize()

    def unpack(self) -> dict[str, Any]:
        """The nested content; its tensors are views of the flat ones."""
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
    """Of all that a checkpoint holds. The formats of files do not check what is read: a flipped bit would pass."""
    found = hashlib.blake2b(repr((plain, layout, list(flat))).encode())
    for tensor in flat.values():
        found.update(tensor.view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def _unpacked(content: dict[str, Any]) -> dict[str, Any]:
    """What `Packed.write` wrote, by name; raises a ValueError if it is not that any more."""
    plain, layout, flat = (content[key] for key in ("plain", "layout", "tensors"))
    if _checksum(plain, layout, flat) != content["checksum"]:
        raise ValueError("its checksum is not that of its content")
    layout = json.loads(layout)
    # Copies: one tensor that is kept would else keep all of them.
    return _with_tensors(plain, layout, [view.clone() for view in _views(layout, flat)])


def _without_tensors(value: Any, path: tuple, found: list[tuple[tuple, Tensor]]) -> Any:
    """The same structure with None for every tensor; `found` gets them with their keys, from the outermost."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return value
    plain = {}
    # Not a call for each of a thousand tensors: training waits for this.
    for key, item in items:
        if isinstance(item, Tensor):
            found.append(((*path, key), item))
            item = None
        elif isinstance(item, (dict, list, tuple)):
            item = _without_tensors(item, (*path, key), found)
        plain[key] = item
    return plain if isinstance(value, dict) else list(plain.values())


def _with_tensors(plain: Any, layout: list, tensors: list[Tensor]) -> Any:
    """A copy of what `_without_tensors` returned, with the tensors back in their places."""
    content = _without_tensors(plain, (), [])
    for (path, _, _), tensor in zip(layout, tensors, strict=True):
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = tensor
    return content


def _kinds(found: list[tuple[tuple, Tensor]]) -> list[tuple[tuple, torch.dtype, torch.Size]]:
    """Keys, dtype and shape of every tensor."""
    return [(path, tensor.dtype, tensor.shape) for path, tensor in found]


def _views(layout: list, flat: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of a layout as views of the flat ones."""
    places, views = dict.fromkeys(flat, 0), []
    for _, dtype, shape in layout:
        first = places[dtype]
        places[dtype] = first + math.prod(shape)
        views.append(flat[dtype][first : places[dtype]].view(shape))
    return views


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write nested dicts for `torch.load`; `path` holds either the old file or the whole new one, never a part."""
    with atomic_file(Path(path)) as partial:
        torch.save(dict(content), partial)


def save_latest(folder: Path, packed: Packed) -> None:
    """Write `checkpoint.pt`; the one that was there becomes `checkpoint.previous.pt`."""
    with atomic_file(folder / LATEST) as partial:
        packed.write(partial)
        # Before the old file is moved: a disk may turn out to be full only here.
        flush(partial)
        if (folder / LATEST).exists():
            os.replace(folder / LATEST, folder / PREVIOUS)


def save_run(folder: Path, packed: Packed, epoch: int, is_best: bool, keep: bool) -> None:
    """Write the state of a run into its folder.

    Args:
        folder: of the run.
        packed: the content of `checkpoint.pt`.
        epoch: the number of epochs done, at the end of one; 0: inside an epoch, where only `checkpoint.pt` is written.
        is_best: also write `best.pt`.
        keep: also write `epoch-N.pt`.
    """
    if epoch:
        content = packed.unpack()
        weights = {key: content[key] for key in ("config", "classes", "metrics", "run")}
        # The moving average is what was evaluated. Copies: files of views hold all that these are views of.
        weights["model"] = {name: value.clone() for name, value in (content["ema"] or content["model"]).items()}
        save_weights((folder / LATEST).with_suffix(".safetensors"), weights)
        if is_best:
            save_checkpoint(folder / BEST, weights)
            save_weights((folder / BEST).with_suffix(".safetensors"), weights)
        if keep:
            with atomic_file(folder / f"epoch-{epoch:04}.pt") as partial:
                packed.write(partial)
    # Last: it says that the others are there. Killed before, the resumed run writes them again.
    save_latest(folder, packed)


def save_weights(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write the weights of a checkpoint as safetensors; what else is in `METADATA` becomes JSON in the metadata."""
    metadata = {"format": "pt", **{key: json.dumps(content[key]) for key in METADATA if key in content}}
    # The library refuses tensors that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in content["model"].items()
    }
    with atomic_file(Path(path)) as partial:
        save_file(tensors, partial, metadata)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or a `.safetensors` file, to the CPU, by `conddetr.engine.unpickle`: no code in it runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no checkpoint, or a pickle of other objects than data; names the file and the object.
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
            "data, and code in a pickle is never run here. Where it was written, save the weights alone: "
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
            f"Checkpoint {path}: its format is {content['format']!r}, this version reads {FORMAT!r}. "
            "Read it with the version of conddetr that wrote it."
        )
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    content.update({key: json.loads(metadata[key]) for key in METADATA if key in metadata})
    return content


def read_latest(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint; where a run's `checkpoint.pt` is damaged or missing, the previous one, and say so.

    The damaged file is renamed to `checkpoint.pt.damaged`: the next save would else move it over the one that was read.

    Returns:
        The file that was read, and its content.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`, of the named file, if neither can be read.
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
        # Other processes may be reading it, and find it either damaged or missing.
        if distributed.is_main() and path.is_file():
            os.replace(path, damaged)
            renamed = f" The damaged file is now {damaged}."
        log.warning("%s Going on from %s instead.%s", error, previous, renamed)
        return previous, content


def has_run(folder: str | Path) -> bool:
    """Whether a folder holds the checkpoint of a run."""
    return any((Path(folder) / name).exists() for name in (LATEST, PREVIOUS))


class CheckpointWriter:
    """Writes in a thread of its own, one job after the other, while training goes on.

    A context manager: at the end it waits for the last job. An error of a job is raised at the next one, or there.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint", _yield_to_others)
        self._pending: Future | None = None
        self._packed: Packed | None = None

    def submit(self, job: Callable[[Packed], None], content: Mapping[str, Any]) -> None:
        """Copy `content` to host memory now, and call `job` with the copy soon."""
        self.wait()
        if self._packed is None or not self._packed.refill(content):
            self._packed = Packed(content)
        self._pending = self._thread.submit(job, self._packed)

    @property
    def is_writing(self) -> bool:
        """Whether a job is not done yet."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Return when all is written; raises what went wrong."""
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


def _yield_to_others() -> None:
    """Give the calling thread a third of the weight of others: training on a CPU uses every core.

    Not less: training waits for it before it writes again, and at the lowest priority, a seventieth of the weight,
    other programs on the same cores would starve both.
    """
    if sys.platform == "linux":
        # There, and only there, every thread has a priority of its own.
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
