"""Why an implementation was not timed: a failure never stops the others, and a failure of ours is reported."""

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from conddetr.kernels.registry import BackendError

OURS = "ours"
"""Prefix of our implementations' names; all others are peers."""
PROBLEM = "the problem itself"
"""Name in the place of an implementation if a problem's inputs, exact answer or reference failed."""
WRONG, FAILED, UNCHECKED = "wrong answer: ", "failed: ", "not checked: "
"""Prefixes of reasons that are defects of ours: it should have run, and correctly."""


class RefusedError(Exception):
    """An implementation must not be timed; the message is the reason."""


@contextmanager
def refusing(name: str, refused: dict[str, str], because: str = "", raised: Sequence = ()) -> Iterator[None]:
    """Put an exception in the block into `refused`, with the reason, instead of raising it.

    All exceptions are caught: peers use assertions, and Triton's and CuTe's errors are no RuntimeErrors. For an
    unexpected one the traceback is printed.

    Args:
        name: of the implementation, or `PROBLEM`.
        refused: name → reason.
        because: prefix of every reason; if given, no failure is unexpected.
        raised: warnings recorded in the block, in which PyTorch gives its reasons.
    """
    is_out_of_memory = False
    try:
        yield
    except RefusedError as error:
        refused[name] = str(error)
    except Exception as error:
        is_out_of_memory = isinstance(error, torch.OutOfMemoryError)
        is_expected = because or not name.startswith((OURS, PROBLEM)) or isinstance(error, BackendError)
        if not (is_expected or is_out_of_memory):
            because = FAILED
            traceback.print_exc(file=sys.stderr)
        refused[name] = because + reason(error, [str(warning.message) for warning in raised])
    if is_out_of_memory:
        # Only here: the traceback no longer holds tensors.
        torch.cuda.empty_cache()


def reason(error: Exception, raised: list[str]) -> str:
    """The reason in one line: SDPA gives it in warnings if a backend is forced, others in the error."""
    raised = [re.sub(r"\s*\(Triggered internally.*", "", text, flags=re.DOTALL).strip() for text in raised]
    reasons = [text for text in raised if not re.search(r"not used because|runtime disabled", text)]
    if "No available kernel" in str(error) and reasons:
        return " ".join(dict.fromkeys(reasons))
    if isinstance(error, (RuntimeError, ValueError, ImportError)):
        first, *rest = str(error).strip().splitlines() or [type(error).__name__]
        return f"{first} {rest[-1].strip()}" if rest and first.endswith(":") else first
    # Triton quotes the kernel first. The fault is in the last line, or in the error that was the cause.
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}".removesuffix(": ")


def is_failure(name: str, why: str) -> bool:
    """Whether a refusal is a defect of ours, not a limit of a backend or a peer."""
    return name == PROBLEM or (name.startswith(OURS) and why.startswith((WRONG, FAILED, UNCHECKED)))
