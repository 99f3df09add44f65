"""Launches of an implementation's call, and the machine code that Triton compiles for it, recorded on a null GPU."""

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
    """One operator that a program calls, with all its launches."""

    name: str
    bytes: int
    """Minimal bytes read and written."""
    seconds: float
    """Predicted from bytes and launches alone, as in `counting.py`."""
    launches: list[Launch]


@dataclass
class Recording:
    """Recording of one call."""

    operations: list[Operation] = field(default_factory=list)
    triton: dict[str, tuple[aot.Built, dict]] = field(default_factory=dict)
    """Kernel → Triton's compiled code, and the keyword arguments, which are those of compile time."""


class _Recorder(Watch):
    """Records operators one by one."""

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self.recording = Recording()
        self._seen = 0

    def __enter__(self) -> "_Recorder":
        run = JITFunction.run

        def run_and_record(kernel: JITFunction, *args: object, **options: object) -> CompiledKernel:
            compiled = run(kernel, *args, **options)
            metadata = compiled.metadata
            built = aot.Built(compiled.asm["cubin"], metadata.shared, metadata.num_warps, metadata.num_stages, 0)
            self.recording.triton[kernel.fn.__name__] = built, options
            return compiled

        self._patches.enter_context(mock.patch.object(JITFunction, "run", run_and_record))
        return super().__enter__()

    def _add(self, name: str, tensors: list, cost: object, flops: int | None, is_light: bool) -> None:
        super()._add(name, tensors, cost, flops, is_light)
        log = launched()
        new, self._seen = log[self._seen :], len(log)
        self.recording.operations.append(Operation(name, cost.bytes, cost.seconds, new))


def record(call: Callable[[], object]) -> Recording:
    """Record the second of two calls: the first initializes caches."""
    call()
    with counted() as counts, _Recorder() as recorder:
        call()
    recorded = sum(len(operation.launches) for operation in recorder.recording.operations)
    if recorded != counts.launches + counts.memsets:
        raise RuntimeError(f"{counts.launches} launches and {counts.memsets} memsets, but operators made {recorded}.")
    return recorder.recording
