"""Makes Triton's interpreter a quarter faster.

At every call of a kernel or a helper it searches the whole language for builtins to patch, with `inspect.getmembers`.
The builtins never change, so one search is enough.
"""

import inspect
from functools import cache
from types import ModuleType

from triton import language
from triton.runtime import interpreter


@cache
def _builtins_of(package: ModuleType | type) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if language.core.is_builtin(member)]


def _patch_builtin(package: ModuleType | type, builder: object, scope: object) -> None:
    for name in _builtins_of(package):
        member = getattr(package, name)
        # Within a kernel the builtins are patched already.
        if language.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def install() -> None:
    """Replace the interpreter's search, if its source has the expected line."""
    searching_line = "for name, member in inspect.getmembers(pkg):"
    if searching_line in inspect.getsource(interpreter._patch_builtin):
        interpreter._patch_builtin = _patch_builtin
