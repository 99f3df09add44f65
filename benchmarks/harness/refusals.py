"""Why an implementation was not timed: one that fails never costs the others, and one of ours that fails is told."""

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from conddetr.kernels.registry import BackendError

OURS = "ours"
"""The names of our implementations begin with this; all others are peers."""
PROBLEM = "the problem itself"
"""Stands for all implementations of a problem whose inputs, exact answer or reference failed."""
WRONG, FAILED, UNCHECKED = "wrong answer: ", "failed: ", "not checked: "
"""What a reason begins with where one of ours should have run, and run right."""


class RefusedError(Exception):
    """Not to be timed; the message is the reason."""


@contextmanager
def refusing(name: str, refused: dict[str, str], because: str = "", raised: Sequence = ()) -> Iterator[None]:
    """What fails within goes to `refused`, with the reason, and is not raised.

    Any exception does: peers assert, Triton's errors and CuTe's are no RuntimeErrors. The traceback of one that nobody
    expects is printed.

    Args:
        name: of the implementation, or `PROBLEM`.
        refused: name → reason.
        because: what every reason begins with; then no failure is unexpected.
        raised: warnings recorded meanwhile, in which PyTorch says why it refused.
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
        # Here, where the traceback holds no tensors any more.
        torch.cuda.empty_cache()


def reason(error: Exception, raised: list[str]) -> str:
    """One line: SDPA says in warnings why a forced backend was refused, others in the error."""
    raised = [re.sub(r"\s*\(Triggered internally.*", "", text, flags=re.DOTALL).strip() for text in raised]
    said = [text for text in raised if not re.search(r"not used because|runtime disabled", text)]
    if "No available kernel" in str(error) and said:
        return " ".join(dict.fromkeys(said))
    if isinstance(error, (RuntimeError, ValueError, ImportError)):
        first, *rest = str(error).strip().splitlines() or [type(error).__name__]
        return f"{first} {rest[-1].strip()}" if rest and first.endswith(":") else first
    # Triton quotes the kernel first; what is wrong with it stands last, or in the error that was the cause.
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}".removesuffix(": ")


def is_failure(name: str, why: str) -> bool:
    """Whether a refusal is a defect of ours, not what a backend or a peer cannot do."""
    return name == PROBLEM or (name.startswith(OURS) and why.startswith((WRONG, FAILED, UNCHECKED)))
