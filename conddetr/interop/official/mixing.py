"""Subclasses of the official code's classes, mixed with ours.

Parameters, hooks, copies and pickles of a module go on as they were.
"""

import inspect
from functools import lru_cache

from torch import nn

from conddetr.interop.changes import change
from conddetr.model.plain import why_not_plain


class Accelerated:
    """Mixed into their class. What is pickled or copied names their class, and gets ours again."""

    _known: tuple[nn.Module, ...] = ()
    """Our code reads these modules' parameters; it was written for no others."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        ours, original = type(self).__bases__
        return _blank, (ours, original), self.__dict__

    def _is_as_known(self) -> bool:
        """No module was exchanged, none has what ours would not call, and this is no copy of `DataParallel`."""
        found = tuple(self.modules())[1:]
        if len(found) != len(self._known) or getattr(self, "_is_replica", False):
            return False
        pairs = zip(found, self._known, strict=True)
        return all(a is b and why_not_plain(a) is None for a, b in pairs)


@lru_cache
def _subclass(ours: type, original: type) -> type:
    return type(f"Accelerated{original.__name__}", (ours, original), {"__module__": __name__})


def _blank(ours: type, original: type) -> nn.Module:
    kind = _subclass(ours, original)
    return kind.__new__(kind)


def mix_in(module: nn.Module, ours: type, **attributes: object) -> None:
    """Give a module a subclass of its own class, mixed with `ours`, and these attributes."""
    kind = type(module) if isinstance(module, ours) else _subclass(ours, type(module))
    change(module, kind, _known=tuple(module.modules())[1:], **attributes)


def arguments(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's `forward`."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
