"""The command line: `conddetr train | eval | predict | attention | export | ...`; `conddetr --help` lists all."""

import sys
from collections.abc import Sequence
from importlib import import_module

from conddetr import interrupt
from conddetr.commands.parser import make_parser
from conddetr.config.flags import unknown_flag


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 if a data set has errors or a kernel is refused; 2 with one line on stderr for bad input;
        143, as after SIGTERM, if a signal stopped training after its state was saved; 130 after Ctrl-C if there was
        nothing to save.
    """
    options, unknown = make_parser().parse_known_args(arguments)
    try:
        if unknown:
            raise ValueError(unknown_flag(options.parser, unknown))
        # Imports PyTorch, which takes seconds.
        command = import_module(f"conddetr.commands.{options.module}")
        interrupt.raise_again()
        return command.run(options) or 0
    except interrupt.InterruptedRunError as error:
        print(f"conddetr {options.command}: {error} Continue with --resume auto.", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"conddetr {options.command}: interrupted.", file=sys.stderr)
        return 130
    except _expected() as error:
        print(f"conddetr {options.command}: {error}", file=sys.stderr)
        return 2


def _expected() -> tuple[type[Exception], ...]:
    """Exceptions of bad input, and of kernels that cannot run if kernels are loaded."""
    registry = sys.modules.get("conddetr.kernels.registry")
    kernel_errors = () if registry is None else (registry.BackendError,)
    return (ValueError, TypeError, OSError, ImportError, FloatingPointError, *kernel_errors)
