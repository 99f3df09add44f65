"""Loading a package's names when they are first used, for a module's `__getattr__`."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Load a name from its module and store it in the package.

    Args:
        package: `__name__` of the package.
        homes: the module of each name, relative to the package.
        name: the name to load.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(import_module(f"{package}.{homes[name]}"), name)
    setattr(sys.modules[package], name, value)
    return value
