"""Checkpoint files: written atomically and in the background, read without unpickling code.

A run's folder holds `checkpoint.pt`, the state after the latest save; `checkpoint.previous.pt`, the one before it;
`best.pt`, the weights of the best evaluation; and `epoch-N.pt` where asked for. The weights of `checkpoint.pt` and
`best.pt` stand beside them as `.safetensors`.
"""

import argparse
import json
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from conddetr.files import atomic_file

log = logging.getLogger(__name__)

LATEST = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
BEST = "best.pt"


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` holds either the old file or the whole new one, never a part."""
    with atomic_file(Path(path)) as partial:
        torch.save(dict(content), partial)


def save_latest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `checkpoint.pt`; the one that was there becomes `checkpoint.previous.pt`."""
    with atomic_file(folder / LATEST) as partial:
        torch.save(dict(content), partial)
        if (folder / LATEST).exists():
            os.replace(folder / LATEST, folder / PREVIOUS)


def save_run(folder: Path, content: Mapping[str, Any], epoch: int, is_best: bool, keep: bool) -> None:
    """Write the state of a run into its folder.

    Args:
        folder: of the run.
        content: of `checkpoint.pt`.
        epoch: the number of epochs done, at the end of one; 0: inside an epoch, where only `checkpoint.pt` is written.
        is_best: also write `best.pt`.
        keep: also write `epoch-N.pt`.
    """
    if epoch:
        # The moving average is what was evaluated.
        weights = {key: content[key] for key in ("config", "classes", "metrics")}
        weights["model"] = content["ema"] or content["model"]
        save_weights((folder / LATEST).with_suffix(".safetensors"), weights)
        if is_best:
            save_checkpoint(folder / BEST, weights)
            save_weights((folder / BEST).with_suffix(".safetensors"), weights)
        if keep:
            save_checkpoint(folder / f"epoch-{epoch:04}.pt", content)
    # Last: it says that the others are there. Killed before, the resumed run writes them again.
    save_latest(folder, content)


def remove_run(folder: str | Path) -> None:
    """Delete what a run left in its folder; pictures and TensorBoard's events stay."""
    for pattern in ("checkpoint*.pt", "epoch-*.pt", "best.pt", "*.safetensors", "log.jsonl"):
        for path in Path(folder).glob(pattern):
            path.unlink()


def save_weights(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write the weights of a checkpoint as safetensors; its `config` and `classes` become JSON in the metadata."""
    metadata = {"format": "pt", "config": json.dumps(content["config"]), "classes": json.dumps(content["classes"])}
    tensors = {name: value.detach().cpu().contiguous() for name, value in content["model"].items()}
    with atomic_file(Path(path)) as partial:
        partial.write_bytes(save(tensors, metadata))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or a `.safetensors` file, to the CPU.

    Official checkpoints' argparse namespaces are the only objects allowed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no checkpoint, or a pickle with code in it; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"Checkpoint {path} can not be read: damaged, or not a checkpoint of tensors and plain values "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {path}: expected a dict, found {type(content).__name__}.")
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    content.update({key: json.loads(metadata[key]) for key in ("config", "classes") if key in metadata})
    return content


def read_latest(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint; where a run's `checkpoint.pt` is damaged or missing, the previous one, and say so.

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
        log.warning("%s Going on from %s instead.", error, previous)
        return previous, content


def has_run(folder: str | Path) -> bool:
    """Whether a folder holds the checkpoint of a run."""
    return any((Path(folder) / name).exists() for name in (LATEST, PREVIOUS))


class CheckpointWriter:
    """Writes in a thread of its own, one job after the other, while training goes on.

    A context manager: at the end it waits for the last job. An error of a job is raised at the next one, or there.
    It keeps host memory of the size of what it writes: new memory for every checkpoint takes longer than the copy.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._memory: dict[tuple, Tensor] = {}

    def submit(self, job: Callable[[dict[str, Any]], None], content: dict[str, Any]) -> None:
        """Copy `content` to host memory now, and call `job` with the copy soon."""
        self.wait()
        pairs: list[tuple[Tensor, Tensor]] = []
        copied = self._copy(content, (), pairs)
        for own, source in pairs:
            own.copy_(source, non_blocking=True)
        # On a GPU the copies are queued before whatever changes the weights next: training need not wait for them.
        device = next((source.device for _, source in pairs if source.is_cuda), None)
        arrived = torch.cuda.current_stream(device).record_event() if device else None
        self._pending = self._thread.submit(_run, job, copied, arrived)

    def _copy(self, value: Any, path: tuple, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        """The same structure with tensors in our memory; `pairs` gets what is to be copied: to, from."""
        if isinstance(value, Tensor):
            own = self._memory.get(path)
            if own is None or own.shape != value.shape or own.dtype != value.dtype:
                own = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._memory[path] = own
            pairs.append((own, value.detach()))
            return own
        if isinstance(value, dict):
            return {key: self._copy(item, (*path, key), pairs) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._copy(item, (*path, index), pairs) for index, item in enumerate(value)]
        return value

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


def _run(job: Callable[[dict[str, Any]], None], content: dict[str, Any], arrived: torch.cuda.Event | None) -> None:
    if arrived is not None:
        arrived.synchronize()
    job(content)
