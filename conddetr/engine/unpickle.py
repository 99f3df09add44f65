"""Reading `.pt` files from any source without running the code that a pickle may hold."""

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
"""Names of Lightning's dict of hyperparameters in its versions; it is read as a dict."""
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>")
"""Matches the refused object's name in PyTorch's messages."""


def load(path: Path) -> Any:
    """Load tensors, plain values, and a few objects that are only data to the CPU with `torch.load`.

    These objects are NumPy's scalars, arrays and dtypes, paths, argparse's namespaces, and Lightning's dict of
    hyperparameters.

    Raises:
        ForbiddenObjectError: the file holds another object; the message is its name.
        Other errors of `torch.load` for a damaged file.
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
    """Classes and functions that may be called while a pickle is read, some under their names in other versions."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    numpy_functions = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in (scalar, array)
        for core in ("core", "_core")
    ]
    # A path of another system cannot be created here, but a pure path can.
    paths = [
        (getattr(pathlib, f"Pure{kind}"), f"{module}.{prefix}{kind}")
        for module in ("pathlib", "pathlib._local")
        for prefix in ("", "Pure")
        for kind in ("PosixPath", "WindowsPath")
    ]
    dicts = [(dict, name) for name in _ATTRIBUTE_DICTS]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *numpy_functions, *paths, *dicts]
