"""What a call of an implementation launches, and the machine code of what Triton makes for it: seen on a null GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

from null_gpu.counts import Launch, counted, launched
from torch import nn
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from counts.counting import Watch
from tools import aot


@dataclass(frozen=True)
class Operation:
    """One operator: an order of the program, with all that it launches."""

    name: str
    bytes: int
    """That it reads and writes at the least."""
    seconds: float
    """Predicted from bytes and launches alone, as `counting.py` says."""
    launches: list[Launch]


@dataclass
class Recording:
    """Of one call."""

    operations: list[Operation] = field(default_factory=list)
    triton: dict[str, tuple[aot.Built, dict]] = field(default_factory=dict)
    """Kernel → what Triton compiled, and the arguments that were given by name: those of compile time."""


class _Recorder(Watch):
    """Watches operators one by one."""

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self.recording = Recording()
        self._seen = 0

    def __enter__(self) -> "_Recorder":
        run = JITFunction.run

        def told(kernel: JITFunction, *args: object, **options: object) -> CompiledKernel:
            compiled = run(kernel, *args, **options)
            made = compiled.metadata
            built = aot.Built(compiled.asm["cubin"], made.shared, made.num_warps, made.num_stages, 0)
            self.recording.triton[kernel.fn.__name__] = built, options
            return compiled

        self._patches.enter_context(mock.patch.object(JITFunction, "run", told))
        return super().__enter__()

    def _add(self, name: str, tensors: list, cost: object, flops: int | None, is_light: bool) -> None:
        super()._add(name, tensors, cost, flops, is_light)
        log = launched()
        new, self._seen = log[self._seen :], len(log)
        self.recording.operations.append(Operation(name, cost.bytes, cost.seconds, new))


def record(call: Callable[[], object]) -> Recording:
    """The second call of two: the first makes what is made once."""
    call()
    with counted() as counts, _Recorder() as recorder:
        call()
    found = sum(len(operation.launches) for operation in recorder.recording.operations)
    if found != counts.launches + counts.memsets:
        raise RuntimeError(f"{counts.launches} launches and {counts.memsets} memsets, of which operators made {found}.")
    return recorder.recording
