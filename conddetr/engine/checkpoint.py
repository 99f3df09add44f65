"""Checkpoint files: written atomically, read without unpickling code."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` holds either the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU. Official checkpoints' argparse namespaces are the only objects allowed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no checkpoint, or a pickle with code in it; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint {path} does not exist.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"Checkpoint {path} can not be read: damaged, or not a checkpoint of tensors and plain values "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {path}: expected a dict, found {type(content).__name__}.")
    return content
