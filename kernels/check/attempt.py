"""What a kernel raises is a reason against it, and no end of the check."""

from collections.abc import Callable
from typing import TypeVar

import torch

from conddetr.kernels.registry import BackendError

Result = TypeVar("Result")
LONGEST = 200
"""Characters of a message: compilers print whole programs."""


def attempt(run: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """The result, or why there is none.

    Raises:
        BackendError: these inputs are not for the implementation, which is no fault.
        OutOfMemoryError: nor is a full GPU.
    """
    try:
        result = run()
        # Kernels run later than they are launched, and so do their errors.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result, None
    except (BackendError, torch.OutOfMemoryError):
        raise
    # Compilers, launches and operators have no error in common.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[0] if lines else "no message"
        return None, f"raises {type(error).__name__}: {message[:LONGEST]}"
