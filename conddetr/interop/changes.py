"""The changes that `accelerate` makes to a module, recorded so that `decelerate` can undo them.

The former state is stored in the module itself, so copies and pickles of an accelerated model contain it.
"""

from dataclasses import dataclass, field

from torch import nn

_NAME = "_before_accelerate"


@dataclass
class _Before:
    """The state of a module before its first change."""

    kind: type[nn.Module] | None = None
    """Its class; None if the class was not changed."""
    values: dict[str, object] = field(default_factory=dict)
    """Former values of the attributes that were set; attributes that did not exist are absent."""
    ours: dict[str, object] = field(default_factory=dict)
    """All attributes that were set, with their new values."""


def change(module: nn.Module, kind: type[nn.Module] | None = None, **attributes: object) -> None:
    """Give a module another class and other plain attributes, and keep the state before the first change.

    Args:
        module: changed in place.
        kind: a direct subclass of the module's class; None: the class stays.
        attributes: no parameters, buffers or submodules.
    """
    before = vars(module).setdefault(_NAME, _Before())
    if kind is not None and type(module) is not kind:
        before.kind = type(module)
        module.__class__ = kind
    for name, value in attributes.items():
        if name not in before.ours and name in vars(module):
            before.values[name] = vars(module)[name]
        before.ours[name] = vars(module)[name] = value


def why_not_restore(module: nn.Module) -> str | None:
    """The reason why `restore` cannot give the module its class back; None if it can."""
    before = vars(module).get(_NAME)
    if before is None or before.kind is None or before.kind in type(module).__bases__:
        return None
    class_name = f"{type(module).__module__}.{type(module).__qualname__}"
    return f"its class became {class_name} after conddetr.accelerate: undo that first (FSDP, a parametrization)"


def restore(module: nn.Module) -> None:
    """Undo every `change` of this module, except attributes that were set to another value since then."""
    before = vars(module).pop(_NAME, None)
    if before is None:
        return
    if before.kind is not None:
        module.__class__ = before.kind
    for name, ours in before.ours.items():
        if vars(module).get(name) is not ours:
            continue
        if name in before.values:
            vars(module)[name] = before.values[name]
        else:
            del vars(module)[name]
