"""A module's forward pass, and its backward pass where it is trained, as CUDA graphs: one pair for each kind of inputs.

The host then launches two things instead of hundreds or thousands. A graph reads weights where they lie in memory, so
they may change in place; it knows nothing of Python, so hooks would not fire and counters see nothing: there the module
is called as before. `torch.cuda.make_graphed_callables` does as much for one kind of inputs; it lends its own memory,
so that outputs and gradients that somebody keeps change with the next call, and gradients cannot be added up.
"""

import logging
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils import _pytree as pytree

from conddetr.capture import MAX_GRAPHS, WARMUP, CudaCapture, Run, aside, bytes_of, reserved, views
from conddetr.kernels import addresses, paths, registry
from conddetr.model.plain import why_not_plain

log = logging.getLogger(__name__)

WAITS = "called a synchronizing CUDA operation"
"""How PyTorch's warning of a wait begins."""


class Pass:
    """One forward pass, as long as somebody holds its outputs."""

    is_done = False
    """Whether its backward pass has been."""


@dataclass
class Recorded:
    """The graphs of one kind of inputs, and the memory that they read and write."""

    inputs: list[Tensor | None]
    outputs: list[Tensor] = field(default_factory=list)
    structure: pytree.TreeSpec | None = None
    """Of the outputs, as the module returns them."""
    trained: list[Tensor] = field(default_factory=list)
    """The parameters that have a gradient."""
    stand_ins: list[Tensor] = field(default_factory=list)
    """What is recorded in their place."""
    grad_outputs: list[Tensor | None] = field(default_factory=list)
    """One for each output; None: it has no gradient."""
    gradients: Tensor | None = None
    """Of all trained parameters, in one tensor of bytes that kinds share."""
    reason: str = ""
    """Why it cannot be recorded; empty: nothing is known."""
    forward: Run | None = None
    backward: Run | None = None
    """None: no output has a gradient."""

    def results(self) -> list[Tensor]:
        """Copies of the outputs, which the next replay overwrites."""
        return [output.detach().clone() for output in self.outputs]


class Graphs:
    """Of one module. Call it in place of the module's forward.

    What PyTorch is told for all, as to allow TF32, stays as it was at the recording. An output that a loss does not use
    gets a gradient of zeros, and so do parameters behind it alone, where a call would leave None. Copies and pickles of
    it hold no graph: they record their own.
    """

    def __init__(self, capture: Callable[[torch.device], Callable[[Run], Run]] = CudaCapture) -> None:
        """`capture`: gives what records on a device: called with a function, it returns what does the same again."""
        self._make_capture = capture
        self._capture: Callable[[Run], Run] | None = None
        self._recorded: dict[tuple, Recorded] = {}
        self._gradients: dict[int, Tensor] = {}
        self._said: set[str] = set()
        self._last: Callable[[], Pass | None] = lambda: None
        self._stream: int | None = None
        """Of all replays: they share memory."""
        self._lock = threading.Lock()
        self.refused = ""
        """Why nothing more is recorded or replayed; empty: it is."""
        self.bytes = 0
        """Memory that the graphs hold."""

    def __reduce__(self) -> tuple:
        return Graphs, (self._make_capture,)

    def __len__(self) -> int:
        """Kinds of inputs that are recorded."""
        return len(self._recorded)

    def __call__(self, module: nn.Module, run: Callable, inputs: Sequence[Tensor | None]) -> object | None:
        """What `run(*inputs)` returns, with gradients where they are recorded; None: nothing was done, `run` is to be
        called as it is.

        Args:
            module: whose parameters, buffers and settings `run` reads.
            run: returns tensors, in lists and dicts and the like, and does nothing else.
            inputs: on one device.

        Raises:
            RuntimeError: a backward pass a second time, from the outputs of one call.
        """
        if torch.compiler.is_compiling():
            return None
        reason, state = self.refused or self._why_not(inputs), ()
        if not reason:
            reason, state = survey(module)
        if reason:
            self.say(reason)
            return None
        # Between the copies of inputs and those of outputs no other replay may be launched.
        with self._lock:
            return self._replay(module, run, inputs, state)

    def say(self, reason: str) -> None:
        """Say once that a call runs without a graph."""
        paths.note("graph", "called without", {"replay": reason})
        if reason not in self._said:
            self._said.add(reason)
            log.warning("CUDA graphs: %s: running without.", reason)

    def _why_not(self, inputs: Sequence[Tensor | None]) -> str:
        """What forbids to replay a graph in this call, whatever the module; empty: nothing."""
        device = inputs[0].device
        if device.type != "cuda" and self._make_capture is CudaCapture:
            return f"graphs need an NVIDIA GPU, the inputs are on {device}"
        if any(value is not None and value.device != device for value in inputs):
            return "the inputs are on several devices"
        if any(value is not None and value.requires_grad for value in inputs):
            return "gradients of the inputs are wanted"
        if addresses.is_capturing(device):
            return "somebody is recording a graph"
        if self._stream not in (None, _stream(device)):
            return "they belong to another stream"
        if registry.transforms():
            return f"{registry.transforms()[0]} is going on"
        last = self._last()
        if last is not None and not last.is_done:
            # It reads memory that a replay would overwrite.
            return "the outputs of an earlier call still wait for their backward pass"
        return "a counter or tracer looks at operations" if torch._C._len_torch_dispatch_stack() > 0 else ""

    def _replay(self, module: nn.Module, run: Callable, inputs: Sequence[Tensor | None], state: tuple) -> object | None:
        found = self._find(module, run, inputs, state)
        if found is None:
            return None
        for own, value in zip(found.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(value, non_blocking=True)
        if found.backward is None:
            found.forward()
            results = found.results()
        else:
            current = Pass()
            self._last = weakref.ref(current)
            results = list(_Replay.apply(found, current, *found.trained))
        paths.note("graph", "replayed")
        return pytree.tree_unflatten(results, found.structure)

    def _find(self, module: nn.Module, run: Callable, inputs: Sequence[Tensor | None], state: tuple) -> Recorded | None:
        device = inputs[0].device
        key = (
            state,
            tuple(None if value is None else (value.shape, value.dtype) for value in inputs),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        )
        if key not in self._recorded:
            if len(self._recorded) == MAX_GRAPHS:
                self.say(f"{MAX_GRAPHS} kinds of inputs and settings are recorded (pad images to fewer shapes)")
                return None
            recorded = self._record(module, run, inputs)
            if recorded is None:
                # Here, where no exception holds what it was raised amid.
                torch.cuda.empty_cache()
                return None
            self._recorded[key] = recorded
        return self._recorded[key]

    def _record(self, module: nn.Module, run: Callable, inputs: Sequence[Tensor | None]) -> Recorded | None:
        device = inputs[0].device
        # Memory that lasts is no part of inference mode, whose tensors nobody else may write.
        is_recorded = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(is_recorded), _uncached(device):
            try:
                found = Recorded([None if value is None else value.detach().clone() for value in inputs])
                with _buffers_stay(module), _stand_ins(module) as pairs:
                    with aside(device):
                        for _ in range(WARMUP - 1):
                            self._prepare(found, run, pairs)
                        reason = found.reason or _objection(lambda: self._prepare(found, run, pairs), device)
                    if reason:
                        self._give_up(reason)
                        return None
                    before = reserved(device)
                    self._capture = self._capture or self._make_capture(device)
                    found.forward = self._capture(lambda: _forward(found, run))
                    found.backward = self._capture(lambda: _backward(found)) if found.trained else None
            except torch.OutOfMemoryError:
                self._give_up("the memory does not suffice for recording")
                return None
        found.outputs[:] = [output.detach() for output in found.outputs]
        found.stand_ins.clear()
        self.bytes += reserved(device) - before
        self._stream = _stream(device)
        return found

    def _prepare(self, found: Recorded, run: Callable, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Forward and backward once; at the first time the memory is made that backward needs."""
        _forward(found, run)
        if not any(output.requires_grad for output in found.outputs):
            return
        if not found.trained:
            found.grad_outputs = [torch.zeros_like(x) if x.requires_grad else None for x in found.outputs]
            _find_trained(found, pairs)
            size = bytes_of(found.trained)
            if size not in self._gradients:
                self._gradients[size] = torch.empty(size, dtype=torch.uint8, device=found.inputs[0].device)
            found.gradients = self._gradients[size]
            _forward(found, run)
        _backward(found)

    def _give_up(self, reason: str) -> None:
        self.refused = reason
        self._recorded.clear()
        self._gradients.clear()
        self._capture, self.bytes = None, 0
        self.say(reason)


_SETTINGS = frozenset((bool, int, float, str, type(None), torch.dtype))


def survey(module: nn.Module) -> tuple[str, tuple]:
    """Why a module has to be called, or an empty string; and all that its graphs depend on: modules and their settings,
    and where parameters and buffers are.
    """
    state = [value for value in vars(getattr(module, "config", module)).values() if type(value) in _SETTINGS]
    # Not `modules`, which looks for names: it is asked in every call. What has several places is asked several times.
    parts = [module]
    for part in parts:
        reason = _why_not_recorded(part, part is module)
        if reason is not None:
            name = next(name for name, other in module.named_modules() if other is part)
            return f"{name or type(module).__name__}: {reason}", ()
        parts += [child for child in part._modules.values() if child is not None]
        state.append(type(part))
        state += [value for value in part.__dict__.values() if type(value) in _SETTINGS]
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                # The object too: it is what gets the gradient.
                state += (id(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad)
    return "", tuple(state)


def _why_not_recorded(part: nn.Module, is_called: bool) -> str | None:
    """What of a module a graph would leave out; `is_called`: it is the one that is called in any case."""
    if part.__dict__.get("_is_replica"):
        return "it is a replica of nn.DataParallel"
    if part.training and part.__dict__.get("gradient_checkpointing"):
        return "gradient checkpointing is on"
    for name, parameter in part._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
    return None if is_called else why_not_plain(part)


def _forward(found: Recorded, run: Callable) -> None:
    # What autograd noted of the last time belongs to another stream.
    found.outputs.clear()
    outputs, found.structure = pytree.tree_flatten(run(*found.inputs))
    found.outputs += outputs


def _backward(found: Recorded) -> None:
    gradients = _gradients_of(found, found.stand_ins)
    torch._foreach_copy_(views(found.gradients, found.trained), gradients)


def _find_trained(found: Recorded, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Which parameters have a gradient; and whether it would be lost."""
    own = [own for own, _ in pairs if own.requires_grad]
    stand_ins = [stand_in for _, stand_in in pairs if stand_in.requires_grad]
    gradients = _gradients_of(found, stand_ins + own)
    is_used = [gradient is not None for gradient in gradients[: len(own)]]
    found.trained, found.stand_ins = list(compress(own, is_used)), list(compress(stand_ins, is_used))
    if any(gradient is not None for gradient in gradients[len(own) :]):
        found.reason = "a parameter is used from elsewhere than its place in the module"


def _gradients_of(found: Recorded, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    # Not `backward`, which would change the parameters' own gradients.
    outputs = [output for output in found.outputs if output.requires_grad]
    grads = [grad for grad in found.grad_outputs if grad is not None]
    return torch.autograd.grad(outputs, parameters, grads, allow_unused=True)


class _Replay(torch.autograd.Function):
    """Both graphs, around which are copies of what autograd hands on."""

    @staticmethod
    def forward(ctx: FunctionCtx, found: Recorded, current: Pass, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.found, ctx.current = found, current
        ctx.set_materialize_grads(False)
        found.forward()
        results = found.results()
        ctx.mark_non_differentiable(
            *(result for result, grad in zip(results, found.grad_outputs, strict=True) if grad is None)
        )
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.current.is_done:
            raise RuntimeError(
                "A second backward pass from the outputs of one call: a CUDA graph keeps what it needs for one. Call "
                "the model again, or do without graphs."
            )
        found = ctx.found
        for own, grad in zip(found.grad_outputs, grads, strict=True):
            if own is not None:
                own.zero_() if grad is None else own.copy_(grad)
        found.backward()
        gradients = views(found.gradients.clone(), found.trained)
        ctx.current.is_done = True
        return None, None, *gradients


@contextmanager
def _uncached(device: torch.device) -> Iterator[None]:
    """As autocast is, but that every cast of a weight is done anew: a graph must not read those of an earlier step."""
    kind = device.type
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        yield


@contextmanager
def _stand_ins(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The module has other parameters in the same memory meanwhile. Gives pairs: its own, and what stands in for it.

    To autograd a parameter is bound to the stream that used it first, as long as anybody keeps what was computed of it,
    as DistributedDataParallel does; and a hook of it would be recorded, and called on the gradient once more.
    """
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    places = [(part._parameters, name) for part in module.modules() for name in part._parameters]
    places = [(parameters, name, parameters[name]) for parameters, name in places if parameters[name] is not None]
    try:
        for parameters, name, own in places:
            stand_in = nn.Parameter(own.detach(), own.requires_grad)
            parameters[name] = pairs.setdefault(id(own), (own, stand_in))[1]
        yield list(pairs.values())
    finally:
        for parameters, name, own in places:
            parameters[name] = own


@contextmanager
def _buffers_stay(module: nn.Module) -> Iterator[None]:
    """What runs inside leaves statistics as they were."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _objection(run: Run, device: torch.device) -> str:
    """What of a function a graph would do otherwise, or cannot; empty: nothing is known.

    Asked before recording: a recording that fails leaves PyTorch's random generators where they cannot go on.
    """
    if device.type != "cuda":
        run()
        return ""
    drawn = torch.random.get_rng_state(), random.getstate()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    places = [f"{entry.filename}:{entry.lineno}" for entry in said if str(entry.message).startswith(WAITS)]
    if places:
        return f"the host waits for the device at {places[0]}"
    # As for layers that are left out at random: always the same ones would be.
    is_same = torch.equal(drawn[0], torch.random.get_rng_state()) and drawn[1] == random.getstate()
    return "" if is_same else "the host draws random numbers"


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
