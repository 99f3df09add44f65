"""Reading `.pt` files of anybody without running the code that a pickle may hold."""

import argparse
import functools
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ATTRIBUTE_DICTS = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
"""Where Lightning's dict of hyperparameters has lived; it is read as a dict."""
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>")
"""How PyTorch's messages name the object that it refuses."""


def load(path: Path) -> Any:
    """`torch.load` to the CPU of tensors, plain values, and a few objects that are only data.

    Those are: NumPy's scalars, arrays and dtypes, paths, argparse's namespaces, Lightning's dict of hyperparameters.

    Raises:
        ForbiddenObjectError: the file holds another object; names it.
        Whatever `torch.load` raises for a damaged file.
    """
    with torch.serialization.safe_globals(_data_only()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = _REFUSED.search(str(error))
            if refused is None:
                raise
            raise ForbiddenObjectError(refused[1] or refused[2]) from error


class ForbiddenObjectError(ValueError):
    """A pickle holds an object that is neither a tensor nor plain data; the message is its full name."""


@functools.cache
def _data_only() -> list[Any]:
    """Classes and functions that may be called while a pickle is read, some under names of other versions."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    of_numpy = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in (scalar, array)
        for core in ("core", "_core")
    ]
    # A path of another system cannot be made here; a pure one can.
    paths = [
        (getattr(pathlib, f"Pure{kind}"), f"{module}.{prefix}{kind}")
        for module in ("pathlib", "pathlib._local")
        for prefix in ("", "Pure")
        for kind in ("PosixPath", "WindowsPath")
    ]
    dicts = [(dict, name) for name in _ATTRIBUTE_DICTS]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *of_numpy, *paths, *dicts]
