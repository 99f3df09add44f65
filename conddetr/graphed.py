"""A module's forward pass, and its backward pass in training, as CUDA graphs: one pair for each kind of inputs.

The host then launches two graphs instead of hundreds or thousands of kernels. A graph reads weights at their addresses,
so they may change in place. It runs no Python, so hooks would not fire and counters would count nothing; in these cases
the module is called as usual. `torch.cuda.make_graphed_callables` does the same for one kind of inputs, but it returns
its own memory: outputs and gradients that a caller keeps change with the next call, and gradients cannot accumulate.
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
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from conddetr.capture import MAX_GRAPHS, WARMUP, CudaCapture, Run, aside, bytes_of, reserved, views
from conddetr.kernels import addresses, paths, registry
from conddetr.model.plain import why_not_plain

log = logging.getLogger(__name__)

WAITS = "called a synchronizing CUDA operation"
"""Start of PyTorch's warning of a synchronization."""


class Pass:
    """One forward pass; it lives as long as its outputs."""

    is_done = False
    """Whether its backward pass has run."""


@dataclass
class Recorded:
    """The graphs of one kind of inputs, and the memory that they read and write."""

    inputs: list[Tensor | None]
    outputs: list[Tensor] = field(default_factory=list)
    structure: pytree.TreeSpec | None = None
    """Structure of the outputs, as the module returns them."""
    trained: list[Tensor] = field(default_factory=list)
    """The parameters that have a gradient."""
    stand_ins: list[Tensor] = field(default_factory=list)
    """The parameters that are recorded instead of them."""
    grad_outputs: list[Tensor | None] = field(default_factory=list)
    """One for each output; None: the output has no gradient."""
    gradients: Tensor | None = None
    """Gradients of all trained parameters, in one tensor of bytes that kinds of inputs share."""
    reason: str = ""
    """Why it cannot be recorded; empty: no reason is known."""
    forward: Run | None = None
    backward: Run | None = None
    """None: no output has a gradient."""

    def results(self) -> list[Tensor]:
        """Copies of the outputs, which the next replay overwrites."""
        return [output.detach().clone() for output in self.outputs]


class Graphs:
    """Graphs of one module. Call it instead of the module's forward.

    PyTorch's global settings, such as TF32, stay as they were at the recording. An output that a loss does not use gets
    a gradient of zeros, and so do parameters that only it depends on; a normal call would leave None. Copies and
    pickles hold no graphs: they record their own.
    """

    def __init__(self, capture: Callable[[torch.device], Callable[[Run], Run]] = CudaCapture) -> None:
        """`capture`: returns a recorder for a device. The recorder takes a function and returns one that replays it."""
        self._make_capture = capture
        self._capture: Callable[[Run], Run] | None = None
        self._recorded: dict[tuple, Recorded] = {}
        self._gradients: dict[int, Tensor] = {}
        self._said: set[str] = set()
        self._last: Callable[[], Pass | None] = lambda: None
        self._stream: int | None = None
        """Stream of all replays, which share memory."""
        self._lock = threading.Lock()
        self.refused = ""
        """Why nothing is recorded or replayed any more; empty: graphs are in use."""
        self.bytes = 0
        """Memory that the graphs hold."""

    def __reduce__(self) -> tuple:
        return Graphs, (self._make_capture,)

    def __len__(self) -> int:
        """Number of kinds of inputs that are recorded."""
        return len(self._recorded)

    def __call__(self, module: nn.Module, run: Callable, inputs: Sequence[Tensor | None]) -> object | None:
        """The result of `run(*inputs)`, with gradients if they are recorded; None: nothing ran, the caller must call
        `run`.

        Args:
            module: the module whose parameters, buffers and settings `run` reads.
            run: returns tensors, also nested in lists, dicts and the like, and has no other effect.
            inputs: on one device.

        Raises:
            RuntimeError: a second backward pass from the outputs of one call.
        """
        if torch.compiler.is_compiling():
            return None
        reason, state = self.refused or self._why_not(inputs), ()
        if not reason:
            reason, state = survey(module)
        if reason:
            self.say(reason)
            return None
        # No other replay may be launched between the copies of the inputs and those of the outputs.
        with self._lock:
            return self._replay(module, run, inputs, state)

    def say(self, reason: str) -> None:
        """Note that a call runs without a graph, and log each reason once."""
        paths.note("graph", "called without", {"replay": reason})
        if reason not in self._said:
            self._said.add(reason)
            log.warning("CUDA graphs: %s: running without.", reason)

    def _why_not(self, inputs: Sequence[Tensor | None]) -> str:
        """Why no graph can be replayed in this call, apart from the module; empty: it can."""
        device = inputs[0].device
        if device.type != "cuda" and self._make_capture is CudaCapture:
            return f"graphs need an NVIDIA GPU, the inputs are on {device}"
        if any(value is not None and value.device != device for value in inputs):
            return "the inputs are on several devices"
        if any(value is not None and value.requires_grad for value in inputs):
            return "the inputs require gradients"
        if addresses.is_capturing(device):
            return "another graph is being recorded"
        if self._stream not in (None, _stream(device)):
            return "they belong to another stream"
        if registry.transforms():
            return f"{registry.transforms()[0]} is active"
        last = self._last()
        if last is not None and not last.is_done:
            # It reads memory that a replay would overwrite.
            return "the backward pass of an earlier call has not run yet"
        return "a counter or tracer intercepts operations" if torch._C._len_torch_dispatch_stack() > 0 else ""

    def _replay(self, module: nn.Module, run: Callable, inputs: Sequence[Tensor | None], state: tuple) -> object | None:
        recorded = self._find(module, run, inputs, state)
        if recorded is None:
            return None
        for buffer, value in zip(recorded.inputs, inputs, strict=True):
            if buffer is not None:
                buffer.copy_(value, non_blocking=True)
        if recorded.backward is None:
            recorded.forward()
            results = recorded.results()
        else:
            current = Pass()
            self._last = weakref.ref(current)
            results = list(_Replay.apply(recorded, current, *recorded.trained))
        paths.note("graph", "replayed")
        return pytree.tree_unflatten(results, recorded.structure)

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
                # Outside the except block, where no exception keeps the tensors of its frames alive.
                torch.cuda.empty_cache()
                return None
            self._recorded[key] = recorded
        return self._recorded[key]

    def _record(self, module: nn.Module, run: Callable, inputs: Sequence[Tensor | None]) -> Recorded | None:
        device = inputs[0].device
        # Persistent memory must not come from inference mode: its tensors cannot be written outside of it.
        is_recorded = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(is_recorded), _uncached(device):
            try:
                recorded = Recorded([None if value is None else value.detach().clone() for value in inputs])
                with _buffers_stay(module), _stand_ins(module) as pairs:
                    with aside(device):
                        for _ in range(WARMUP - 1):
                            self._prepare(recorded, run, pairs)
                        reason = recorded.reason or _objection(lambda: self._prepare(recorded, run, pairs), device)
                    if reason:
                        self._give_up(reason)
                        return None
                    before = reserved(device)
                    self._capture = self._capture or self._make_capture(device)
                    recorded.forward = self._capture(lambda: _forward(recorded, run))
                    recorded.backward = self._capture(lambda: _backward(recorded)) if recorded.trained else None
            except torch.OutOfMemoryError:
                self._give_up("the memory does not suffice for recording")
                return None
        recorded.outputs[:] = [output.detach() for output in recorded.outputs]
        recorded.stand_ins.clear()
        self.bytes += reserved(device) - before
        self._stream = _stream(device)
        return recorded

    def _prepare(self, recorded: Recorded, run: Callable, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Run forward and backward once; the first run allocates the memory that backward needs."""
        _forward(recorded, run)
        if not any(output.requires_grad for output in recorded.outputs):
            return
        if not recorded.trained:
            recorded.grad_outputs = [torch.zeros_like(x) if x.requires_grad else None for x in recorded.outputs]
            _find_trained(recorded, pairs)
            size = bytes_of(recorded.trained)
            if size not in self._gradients:
                self._gradients[size] = torch.empty(size, dtype=torch.uint8, device=recorded.inputs[0].device)
            recorded.gradients = self._gradients[size]
            _forward(recorded, run)
        _backward(recorded)

    def _give_up(self, reason: str) -> None:
        self.refused = reason
        self._recorded.clear()
        self._gradients.clear()
        self._capture, self.bytes = None, 0
        self.say(reason)


_SETTINGS = frozenset((bool, int, float, str, type(None), torch.dtype))


def survey(module: nn.Module) -> tuple[str, tuple]:
    """Why a module must be called without a graph, or an empty string; and everything that its graphs depend on:
    modules and their settings, and the addresses of parameters and buffers.
    """
    state = [value for value in vars(getattr(module, "config", module)).values() if type(value) in _SETTINGS]
    # Not `modules`, which builds names: this runs in every call. Shared modules are visited several times.
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
                # The object too, because it receives the gradient.
                state += (id(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad)
    return "", tuple(state)


def _why_not_recorded(part: nn.Module, is_called: bool) -> str | None:
    """Why a graph would miss something in a module, or None; `is_called`: the module that is called, hooks and all."""
    if part.__dict__.get("_is_replica"):
        return "it is a replica of nn.DataParallel"
    if part.training and part.__dict__.get("gradient_checkpointing"):
        return "gradient checkpointing is on"
    for name, parameter in part._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
    return None if is_called else why_not_plain(part)


def _forward(recorded: Recorded, run: Callable) -> None:
    # Drops the autograd graph of the last run, which belongs to another stream.
    recorded.outputs.clear()
    outputs, recorded.structure = pytree.tree_flatten(run(*recorded.inputs))
    recorded.outputs += outputs


def _backward(recorded: Recorded) -> None:
    gradients = _gradients_of(recorded, recorded.stand_ins)
    torch._foreach_copy_(views(recorded.gradients, recorded.trained), gradients)


def _find_trained(recorded: Recorded, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Set the parameters that have a gradient; set a reason if a gradient would be lost."""
    parameters = [parameter for parameter, _ in pairs if parameter.requires_grad]
    stand_ins = [stand_in for _, stand_in in pairs if stand_in.requires_grad]
    gradients = _gradients_of(recorded, stand_ins + parameters)
    is_used = [gradient is not None for gradient in gradients[: len(parameters)]]
    recorded.trained, recorded.stand_ins = list(compress(parameters, is_used)), list(compress(stand_ins, is_used))
    if any(gradient is not None for gradient in gradients[len(parameters) :]):
        recorded.reason = "a parameter is also used through another reference than its module"


def _gradients_of(recorded: Recorded, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    # Not `backward`, which would change the parameters' gradients.
    outputs = [output for output in recorded.outputs if output.requires_grad]
    grads = [grad for grad in recorded.grad_outputs if grad is not None]
    return torch.autograd.grad(outputs, parameters, grads, allow_unused=True)


class _Replay(torch.autograd.Function):
    """Replays both graphs, and copies their results and gradients for autograd."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, current: Pass, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.recorded, ctx.current = recorded, current
        ctx.set_materialize_grads(False)
        recorded.forward()
        results = recorded.results()
        ctx.mark_non_differentiable(
            *(result for result, grad in zip(results, recorded.grad_outputs, strict=True) if grad is None)
        )
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.current.is_done:
            raise RuntimeError(
                "This is a second backward pass from the outputs of one call, but a CUDA graph keeps the activations "
                "for one only. Call the model again, or run it without graphs."
            )
        recorded = ctx.recorded
        for buffer, grad in zip(recorded.grad_outputs, grads, strict=True):
            if buffer is not None:
                buffer.zero_() if grad is None else buffer.copy_(grad)
        recorded.backward()
        gradients = views(recorded.gradients.clone(), recorded.trained)
        ctx.current.is_done = True
        return None, None, *gradients


@contextmanager
def _uncached(device: torch.device) -> Iterator[None]:
    """The current autocast without its weight cache: a graph must not read casts of an earlier step."""
    device_type = device.type
    with torch.autocast(
        device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type), cache_enabled=False
    ):
        yield


@contextmanager
def _stand_ins(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Replace the module's parameters by others in the same memory. Yields pairs: the parameter and its stand-in.

    Autograd binds a parameter to the stream that used it first, as long as a result of it is alive, which
    DistributedDataParallel keeps. And a parameter's hook would be recorded, and then called on the gradient again.
    """
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    slots = [(part._parameters, name) for part in module.modules() for name in part._parameters]
    slots = [(parameters, name, parameters[name]) for parameters, name in slots if parameters[name] is not None]
    try:
        for parameters, name, parameter in slots:
            stand_in = nn.Parameter(parameter.detach(), parameter.requires_grad)
            parameters[name] = pairs.setdefault(id(parameter), (parameter, stand_in))[1]
        yield list(pairs.values())
    finally:
        for parameters, name, parameter in slots:
            parameters[name] = parameter


@contextmanager
def _buffers_stay(module: nn.Module) -> Iterator[None]:
    """Restore all buffers at the end, so that statistics do not change."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _objection(run: Run, device: torch.device) -> str:
    """Why a graph could not record a function or would behave differently; empty: no reason is known.

    Checked before recording, because a failed recording leaves PyTorch's random generators unusable.
    """
    if device.type != "cuda":
        run()
        return ""
    random_states = torch.random.get_rng_state(), random.getstate()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    lines = [f"{entry.filename}:{entry.lineno}" for entry in warned if str(entry.message).startswith(WAITS)]
    if lines:
        return f"the host waits for the device at {lines[0]}"
    # Such as layers that are dropped at random: a graph would always drop the same ones.
    is_same = torch.equal(random_states[0], torch.random.get_rng_state()) and random_states[1] == random.getstate()
    return "" if is_same else "the host draws random numbers"


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
