"""Subclasses of the official code's classes, mixed with ours.

Parameters, hooks, copies and pickles of a module work as before.
"""

import inspect
from functools import lru_cache

from torch import nn

from conddetr.interop.changes import change
from conddetr.model.plain import why_not_plain


class Accelerated:
    """Mixin for an official class. Pickles and copies store the official class and are mixed with ours again."""

    _known: tuple[nn.Module, ...] = ()
    """The modules whose parameters our code reads; it supports no others."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        ours, original = type(self).__bases__
        return _new_instance, (ours, original), self.__dict__

    def _is_unmodified(self) -> bool:
        """No module was replaced or has hooks or a forward that ours would skip; not a replica of `DataParallel`."""
        modules = tuple(self.modules())[1:]
        if len(modules) != len(self._known) or getattr(self, "_is_replica", False):
            return False
        pairs = zip(modules, self._known, strict=True)
        return all(a is b and why_not_plain(a) is None for a, b in pairs)


@lru_cache
def _subclass(ours: type, original: type) -> type:
    return type(f"Accelerated{original.__name__}", (ours, original), {"__module__": __name__})


def _new_instance(ours: type, original: type) -> nn.Module:
    subclass = _subclass(ours, original)
    return subclass.__new__(subclass)


def mix_in(module: nn.Module, ours: type, **attributes: object) -> None:
    """Give a module a subclass of its own class, mixed with `ours`, and these attributes."""
    subclass = type(module) if isinstance(module, ours) else _subclass(ours, type(module))
    change(module, subclass, _known=tuple(module.modules())[1:], **attributes)


def arguments(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's `forward`."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
