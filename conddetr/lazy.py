"""Names of a package that are loaded when they are used: for a module's `__getattr__`."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load(package: str, homes: Mapping[str, str], name: str) -> Any:
    """A name from its module, kept in the package from then on.

    Args:
        package: `__name__` of the package.
        homes: the module of each name, relative to the package.
        name: what is looked for.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(import_module(f"{package}.{homes[name]}"), name)
    setattr(sys.modules[package], name, value)
    return value
