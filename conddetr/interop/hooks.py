"""Hooks, forwards and parametrizations that users attach to modules, for the report of an acceleration."""

from collections import defaultdict
from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize

from conddetr.interop.report import AccelerationReport, Part
from conddetr.model.plain import HOOKS


def has_hooks_of_user(module: nn.Module) -> bool:
    """Whether a hook is attached besides transformers' own, which record attention maps and hidden states."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Whether `module.forward = function` was set, which runs instead of the method of the class."""
    return "forward" in vars(module)


def report_hooks(
    model: nn.Module, report: AccelerationReport, fallback: Callable[[str, nn.Module], str | None]
) -> None:
    """List the modules to which a user attached something, with the parts that fall back because of it.

    Args:
        fallback: takes a module's name and the module, returns a note on the part that falls back; None: none does.
    """
    names_by_note = defaultdict(list)
    for name, module in model.named_modules():
        attachments = {
            "hooks": has_hooks_of_user(module),
            "its own forward": has_own_forward(module),
            "parametrizations": parametrize.is_parametrized(module),
        }
        attached = " and ".join(attachment for attachment, is_attached in attachments.items() if is_attached)
        if attached:
            reason = fallback(name, module) or "called as before, nothing falls back"
            names_by_note[f"{attached}: {reason}"].append(name or "the model")
    for note, names in names_by_note.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        report.hooks.append(Part(", ".join(names[:3]) + more, len(names), note))
