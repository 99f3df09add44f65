"""What users attach to modules, and what of an acceleration gives way to it, for the report."""

from collections import defaultdict
from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize

from conddetr.interop.report import AccelerationReport, Part
from conddetr.model.plain import HOOKS


def has_hooks_of_user(module: nn.Module) -> bool:
    """Whether a hook is attached beside those by which transformers records attention maps and hidden states."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Whether `module.forward = function` was set, which runs in place of the method of the class."""
    return "forward" in vars(module)


def report_hooks(
    model: nn.Module, report: AccelerationReport, gives_way: Callable[[str, nn.Module], str | None]
) -> None:
    """List the modules that have something of their user, with what it does to the acceleration.

    Args:
        gives_way: by name and module, what gives way to it; None: nothing does.
    """
    found = defaultdict(list)
    for name, module in model.named_modules():
        kinds = {
            "hooks": has_hooks_of_user(module),
            "a forward of its own": has_own_forward(module),
            "parametrizations": parametrize.is_parametrized(module),
        }
        what = " and ".join(kind for kind, is_there in kinds.items() if is_there)
        if what:
            reason = gives_way(name, module) or "called as before, nothing gives way"
            found[f"{what}: {reason}"].append(name or "the model")
    for note, names in found.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        report.hooks.append(Part(", ".join(names[:3]) + more, len(names), note))
