"""Cost of operations on a device: launches, waits, bytes, FLOPs and predicted time, by operation and by part of a step.

Launches and waits are counted on a null GPU (tests/null_gpu). Bytes and FLOPs follow from shapes. The predicted time of
an operation is the largest of three: its bytes at the memory's rate, its FLOPs at the rate of their units, and a
constant per launch, copy and memset. An operation of several kernels counts its bytes once: bytes and time are lower
bounds.
"""

import ctypes
import re
import sys
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from types import CodeType, FrameType
from unittest import mock

import torch
from null_gpu.counts import totals
from torch import Tensor, nn
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from conddetr.kernels import operators

BANDWIDTH = 2.6e12
"""Bytes per second of a copy on an H100."""
RATES = {"convolutions": 350e12, "products": 450e12, "float32": 40e12}
"""FLOP/s that cuDNN and cuBLAS reach on it; the first two in half precision."""
LAUNCH = 2.2e-6
"""Seconds of a kernel with almost no work, in a full queue or a CUDA graph."""
MANY_NUMBERS = 1e6
"""An operation on more floating-point numbers is listed if it is unknown whether it has FLOPs."""
PARTS = ("backbone", "encoder", "decoder", "heads and loss", "optimizer", "compiled", "other")
"""`compiled` is Inductor's code of a model, which cannot be split into parts."""

_MODULES = {
    "heads and loss": r"(^|\.)(class_embed|bbox_embed|class_labels_classifier|bbox_predictor)",
    "backbone": r"(^|\.)backbone",
    "encoder": r"(^|\.)(encoder|input_proj)",
    "decoder": r"(^|\.)(decoder|query_)",
}
"""Part → names of our and transformers' modules and parameters."""
_FILES = {
    "compiled": r"inductor[^:]*/\w\w/c\w+\.py",
    "optimizer": r"torch/optim/|torch/nn/utils/clip_grad\.py",
    "backbone": r"conddetr/model/(fast/)?(resnet|backbone)\.py|conddetr/interop/huggingface/backbone\.py",
    "encoder": r"conddetr/model/fast/encoder\.py",
    "decoder": r"conddetr/model/fast/decoder\.py",
    "heads and loss": r"conddetr/loss/|conddetr/model/detr\.py:DETR\._predict"
    r"|conddetr/interop/huggingface/loss\.py|transformers/loss/"
    r"|modeling_conditional_detr\.py:ConditionalDetrForObjectDetection\.forward",
}
"""Part → files, with functions after a colon, for code outside named modules. The innermost frame decides."""
_PRODUCTS = r"mm|mv|dot|conv|attention|linear|bilinear|matmul|einsum|rnn|lstm|gru|fft|cdist|linalg_(?!vector_norm)"
_GENERIC = {"void", "gpu_kernel_impl", "gpu_kernel_impl_nocast", "BinaryFunctor", "AUnaryFunctor", "BUnaryFunctor"}
"""Words in kernel names that do not describe the kernel."""
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"}
"""Operators that do not read the tensor they write to."""


@dataclass
class Cost:
    """Summed cost of operations."""

    calls: int = 0
    launches: int = 0
    waits: int = 0
    bytes: int = 0
    """Bytes read and written; each tensor counts once per direction."""
    flops: int = 0
    seconds: float = 0.0
    """Predicted."""

    def add(self, other: "Cost") -> None:
        """Add another cost in place."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Watch(TorchDispatchMode):
    """While active, records the cost of every operation: operators, and Triton kernels outside operators."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.by_operation: dict[tuple[str, str], Cost] = defaultdict(Cost)
        """Name and dtype → cost."""
        self.by_part: dict[str, Cost] = defaultdict(Cost)
        self.without_formula: set[str] = set()
        """Operations on many numbers that may have FLOPs; without a formula they count as 0."""
        self._parts = _Parts(model)
        self._inside = False
        self._patches = ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs unchanged under this mode; PyTorch calls this method of each mode."""
        return True

    def __enter__(self) -> "Watch":
        _register_flops()
        for kind in (JITFunction, CachingAutotuner):
            self._patches.enter_context(mock.patch.object(kind, "run", _watched(self, kind.run)))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, function: object, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Called for every operator."""
        kwargs = kwargs or {}
        with self._recorded() as cost:
            out = function(*args, **kwargs)
            tensors = _on_gpu((args, kwargs, out))
            cost.bytes = _moved(function, args, kwargs, out)
        if cost.calls:
            flops = _flops(function, args, kwargs, out)
            name = str(function).removeprefix("aten.").removesuffix(".default")
            # All of PyTorch's products have such names; its other operators compute little per number.
            is_light = function.namespace == "aten" and re.search(_PRODUCTS, name) is None
            self._add(name, tensors, cost, flops, is_light)
        return out

    def launch(self, name: str, read_and_written: list[Tensor], arguments: object, run: Callable) -> object:
        """Record a Triton kernel; inside an operator it counts there. Which tensors it only reads is unknown."""
        if self._inside:
            return run()
        with self._recorded() as cost:
            out = run()
            tensors = _on_gpu(arguments)
            cost.bytes = sum({t.data_ptr(): _size(t) for t in tensors}.values())
            cost.bytes += sum({t.data_ptr(): _size(t) for t in read_and_written}.values())
        if cost.calls:
            # Inductor's pointwise kernels and reductions have few FLOPs; its products are templates.
            is_known = name.startswith("triton_") and not name.startswith("triton_tem")
            self._add(name, tensors, cost, None, is_known)
        return out

    @contextmanager
    def _recorded(self) -> Iterator[Cost]:
        """The cost of the block, with the `seconds` of its launches; no calls if the block used no device."""
        cost, self._part, before = Cost(), self._parts.now(), totals()
        was_inside, self._inside = self._inside, True
        try:
            yield cost
        finally:
            self._inside = was_inside
        launches, waits, others = (now - then for now, then in zip(totals(), before, strict=True))
        cost.calls, cost.launches, cost.waits = int(launches + waits + others > 0), launches, waits
        cost.seconds = LAUNCH * (launches + others)

    def _add(self, name: str, tensors: list[Tensor], cost: Cost, flops: int | None, is_light: bool) -> None:
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        dtype = (floating or tensors)[0].dtype if tensors else torch.uint8
        if flops is None and not is_light and sum(tensor.numel() for tensor in floating) > MANY_NUMBERS:
            self.without_formula.add(name)
        cost.flops = flops or 0
        unit = "float32" if dtype == torch.float32 else "convolutions" if "conv" in name else "products"
        cost.seconds = max(cost.seconds, cost.bytes / BANDWIDTH, cost.flops / RATES[unit])
        self.by_operation[name, str(dtype).removeprefix("torch.")].add(cost)
        self.by_part[self._part].add(cost)


def _watched(watch: Watch, run: Callable) -> Callable:
    """A kernel's `run` that reports to the watch. Inductor names tensors that are read and written `in_out_ptr…`."""

    def launch(kernel: object, *args: object, **options: object) -> object:
        names = getattr(kernel.fn, "arg_names", [])
        read_and_written = [value for name, value in zip(names, args, strict=False) if name.startswith("in_out_ptr")]
        return watch.launch(
            kernel.fn.__name__, read_and_written, (args, options), lambda: run(kernel, *args, **options)
        )

    return launch


class _Parts:
    """The part of a step that is running.

    In the forward pass the Python stack determines it, in backward the number of the node: nodes are numbered in the
    order of the operations that made them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {id(module): _module_part(name) for name, module in model.named_modules()}
        self._parameters = {id(parameter): _module_part(name) for name, parameter in model.named_parameters()}
        self._numbers: list[int] = []
        self._made_in: list[str] = []
        self._last = "other"

    def now(self) -> str:
        """The current part, one of `PARTS`."""
        part = self._stack_part(sys._getframe(1))
        if torch._C._current_graph_task_id() != -1:
            self._last = part if part == "compiled" else self._node_part(torch._C._current_autograd_node())
            return self._last
        number = torch.autograd._get_sequence_nr() - 1
        # Later operations without a node see the same number.
        if not self._numbers or number > self._numbers[-1]:
            self._numbers.append(number)
            self._made_in.append(part or "other")
        return part or "other"

    def _stack_part(self, frame: FrameType | None) -> str | None:
        while frame is not None:
            part = _code_part(frame.f_code)
            if part is None and "self" in frame.f_code.co_varnames:
                part = self._modules.get(id(frame.f_locals.get("self")))
            if part is not None:
                return part
            frame = frame.f_back
        return None

    def _node_part(self, node: object) -> str:
        # Between nodes, gradients are accumulated.
        if node is None:
            return self._last
        if node.name().endswith("AccumulateGrad"):
            return self._parameters.get(id(node.variable)) or "other"
        index = bisect_left(self._numbers, node._sequence_nr())
        return self._made_in[index] if index < len(self._made_in) else "other"


def _module_part(name: str) -> str | None:
    """The part of a module or parameter."""
    return next((part for part, pattern in _MODULES.items() if re.search(pattern, name)), None)


@cache
def _code_part(code: CodeType) -> str | None:
    """The part of a function."""
    location = f"{code.co_filename}:{code.co_qualname}"
    return next((part for part, pattern in _FILES.items() if re.search(pattern, location)), None)


def _on_gpu(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_cuda]


def _size(tensor: Tensor) -> int:
    """Bytes of the tensor's memory: expanded dimensions count once."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(size for size, stride in steps if stride != 0)


def _moved(function: object, args: tuple, kwargs: dict, out: object) -> int:
    """Bytes that an operator reads and writes."""
    read, written = {}, {t.data_ptr(): _size(t) for t in _on_gpu(out)}
    overwrites = function.overloadpacket.__name__ in _OVERWRITING
    for index, argument in enumerate(function._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _on_gpu(value):
            if is_written:
                written[tensor.data_ptr()] = _size(tensor)
            if not is_written or not (overwrites or argument.is_out):
                read[tensor.data_ptr()] = max(_size(tensor), read.get(tensor.data_ptr(), 0))
    return sum(read.values()) + sum(written.values())


def _flops(function: object, args: tuple, kwargs: dict, out: object) -> int | None:
    """FLOPs of an operator; None without a formula."""
    formula = flop_registry.get(function.overloadpacket)
    return None if formula is None else int(formula(*args, **kwargs, out_val=out))


@cache
def _register_flops() -> None:
    """Register the formula of a PyTorch operator that lacks one; cuDNN's have theirs where we call them."""

    def product(_: list[int], left: list[int], right: list[int], *__: object, **___: object) -> int:
        return 2 * prod(left) * right[-1]

    operators.count_flops("aten::_addmm_activation", product)


def by_short_name(kernels: Counter) -> dict[str, int]:
    """Launches by short kernel names, most launches first."""
    by_name: Counter = Counter()
    for name, launches in kernels.items():
        by_name[short_name(name)] += launches
    return dict(by_name.most_common())


@cache
def short_name(name: str) -> str:
    """A kernel's name without namespaces and types; for a generic kernel, its function in brackets.

    >>> short_name("_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEESt5arrayIPcLm1EEEEviT0_T1_")
    'vectorized_elementwise_kernel (FillFunctor)'
    """
    whole = _demangled(name)
    whole = re.sub(r"\w+::(?=\w)", "", whole.replace("(anonymous namespace)::", ""))
    words = [word for word in re.findall(r"[A-Za-z_]\w*", whole) if word not in _GENERIC]
    if not words:
        return name
    first, *rest = words
    descriptive = (word for word in rest if re.search(r"[fF]unctor|_cuda$|_kernel|_impl$|^launch_|Ops$", word))
    function = next((word for word in descriptive if word != first), None)
    return f"{first} ({function})" if function else first


def _demangled(name: str) -> str:
    """The demangled name by the C++ library; other names stay."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    address = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return name
    text = ctypes.string_at(address).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    return text
