"""Runs a kernel; its errors become a reason to refuse it and do not end the check."""

from collections.abc import Callable
from typing import TypeVar

import torch

from conddetr.kernels.registry import BackendError

Result = TypeVar("Result")
LONGEST = 200
"""Maximum characters of a message: compilers print whole programs."""


def attempt(run: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return the result, or the reason why there is none.

    Raises:
        BackendError: the implementation does not support these inputs, which is no fault.
        OutOfMemoryError: the GPU is full, which is no fault either.
    """
    try:
        result = run()
        # Launches are asynchronous, so errors surface later.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result, None
    except (BackendError, torch.OutOfMemoryError):
        raise
    # Compilers, launches and operators share no error class.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[0] if lines else "no message"
        return None, f"raises {type(error).__name__}: {message[:LONGEST]}"
