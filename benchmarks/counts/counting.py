"""What operations ask of a device: launches, waits, bytes and FLOPs, and the time that they should take, by operation
and by part of a step.

Launches and waits are those of a null GPU (tests/null_gpu). Bytes and FLOPs follow from shapes. The time is a
prediction, for each operation the largest of its bytes at the memory's rate, its FLOPs at the rate of the units that do
them, and a time for each launch, copy and clearing of memory. An operation of several kernels counts its bytes once:
bytes and time are lower bounds.
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
"""Bytes per second: what a copy reaches on an H100."""
RATES = {"convolutions": 350e12, "products": 450e12, "float32": 40e12}
"""FLOP/s that cuDNN and cuBLAS reach there; the first two in half precision."""
LAUNCH = 2.2e-6
"""Seconds of a kernel that has next to nothing to do, in a full queue or a CUDA graph."""
MANY_NUMBERS = 1e6
"""An operation on more floating numbers is named where neither its FLOPs nor their absence are known."""
PARTS = ("backbone", "encoder", "decoder", "heads and loss", "optimizer", "compiled", "other")
"""`compiled` is what Inductor made of a model, and cannot be told apart."""

_MODULES = {
    "heads and loss": r"(^|\.)(class_embed|bbox_embed|class_labels_classifier|bbox_predictor)",
    "backbone": r"(^|\.)backbone",
    "encoder": r"(^|\.)(encoder|input_proj)",
    "decoder": r"(^|\.)(decoder|query_)",
}
"""Part → names of modules and parameters, ours and transformers'."""
_PLACES = {
    "compiled": r"inductor[^:]*/\w\w/c\w+\.py",
    "optimizer": r"torch/optim/|torch/nn/utils/clip_grad\.py",
    "backbone": r"conddetr/model/(fast/)?(resnet|backbone)\.py|conddetr/interop/huggingface/backbone\.py",
    "encoder": r"conddetr/model/fast/encoder\.py",
    "decoder": r"conddetr/model/fast/decoder\.py",
    "heads and loss": r"conddetr/loss/|conddetr/model/detr\.py:DETR\._predict"
    r"|conddetr/interop/huggingface/loss\.py|transformers/loss/"
    r"|modeling_conditional_detr\.py:ConditionalDetrForObjectDetection\.forward",
}
"""Part → files, and functions after a colon, for what no module's name tells. The innermost frame decides."""
_PRODUCTS = r"mm|mv|dot|conv|attention|linear|bilinear|matmul|einsum|rnn|lstm|gru|fft|cdist|linalg_(?!vector_norm)"
_GENERIC = {"void", "gpu_kernel_impl", "gpu_kernel_impl_nocast", "BinaryFunctor", "AUnaryFunctor", "BUnaryFunctor"}
"""Words of kernels' names that say nothing of what they do."""
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"}
"""Operators that do not read what they write to."""


@dataclass
class Cost:
    """Of operations together."""

    calls: int = 0
    launches: int = 0
    waits: int = 0
    bytes: int = 0
    """Read and written, each tensor once for each."""
    flops: int = 0
    seconds: float = 0.0
    """Predicted."""

    def add(self, other: "Cost") -> None:
        """Sum up in place."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Watch(TorchDispatchMode):
    """While it is active, every operation's cost is noted: operators, and Triton kernels that no operator launches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.by_operation: dict[tuple[str, str], Cost] = defaultdict(Cost)
        """Name and dtype → cost."""
        self.by_part: dict[str, Cost] = defaultdict(Cost)
        self.without_formula: set[str] = set()
        """Operations on many numbers that may do more than move them; without a formula their FLOPs count as none."""
        self._parts = _Parts(model)
        self._inside = False
        self._patches = ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Code that torch.compile has made runs under it as it would without; PyTorch asks this of each mode."""
        return True

    def __enter__(self) -> "Watch":
        _teach_flops()
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
        with self._noted() as cost:
            out = function(*args, **kwargs)
            tensors = _on_gpu((args, kwargs, out))
            cost.bytes = _moved(function, args, kwargs, out)
        if cost.calls:
            flops = _flops(function, args, kwargs, out)
            name = str(function).removeprefix("aten.").removesuffix(".default")
            # Of PyTorch's operators all products have such names; the others do little to each number.
            is_light = function.namespace == "aten" and re.search(_PRODUCTS, name) is None
            self._add(name, tensors, cost, flops, is_light)
        return out

    def launch(self, name: str, read_and_written: list[Tensor], arguments: object, run: Callable) -> object:
        """A Triton kernel; one inside an operator is part of that. Which of its tensors it only reads is not known."""
        if self._inside:
            return run()
        with self._noted() as cost:
            out = run()
            tensors = _on_gpu(arguments)
            cost.bytes = sum({t.data_ptr(): _size(t) for t in tensors}.values())
            cost.bytes += sum({t.data_ptr(): _size(t) for t in read_and_written}.values())
        if cost.calls:
            # Inductor's pointwise kernels and reductions; its products are templates.
            is_known = name.startswith("triton_") and not name.startswith("triton_tem")
            self._add(name, tensors, cost, None, is_known)
        return out

    @contextmanager
    def _noted(self) -> Iterator[Cost]:
        """The cost of the block, whose `seconds` are those of launches at first; no calls if it asked for nothing."""
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
    """A kernel's `run` that tells the watch. Inductor calls `in_out_ptr…` what a kernel reads and writes."""

    def told(kernel: object, *args: object, **options: object) -> object:
        names = getattr(kernel.fn, "arg_names", [])
        both = [value for name, value in zip(names, args, strict=False) if name.startswith("in_out_ptr")]
        return watch.launch(kernel.fn.__name__, both, (args, options), lambda: run(kernel, *args, **options))

    return told


class _Parts:
    """Which part of a step the present moment belongs to.

    In the forward pass the Python stack tells, in backward the node's number: nodes are numbered in the order of the
    operations that made them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {id(module): _named(name) for name, module in model.named_modules()}
        self._parameters = {id(parameter): _named(name) for name, parameter in model.named_parameters()}
        self._numbers: list[int] = []
        self._made_in: list[str] = []
        self._last = "other"

    def now(self) -> str:
        """One of `PARTS`."""
        part = self._of_stack(sys._getframe(1))
        if torch._C._current_graph_task_id() != -1:
            self._last = part if part == "compiled" else self._of_node(torch._C._current_autograd_node())
            return self._last
        number = torch.autograd._get_sequence_nr() - 1
        # Later operations without a node see the same number.
        if not self._numbers or number > self._numbers[-1]:
            self._numbers.append(number)
            self._made_in.append(part or "other")
        return part or "other"

    def _of_stack(self, frame: FrameType | None) -> str | None:
        while frame is not None:
            part = _placed(frame.f_code)
            if part is None and "self" in frame.f_code.co_varnames:
                part = self._modules.get(id(frame.f_locals.get("self")))
            if part is not None:
                return part
            frame = frame.f_back
        return None

    def _of_node(self, node: object) -> str:
        # Between nodes gradients are added up.
        if node is None:
            return self._last
        if node.name().endswith("AccumulateGrad"):
            return self._parameters.get(id(node.variable)) or "other"
        place = bisect_left(self._numbers, node._sequence_nr())
        return self._made_in[place] if place < len(self._made_in) else "other"


def _named(name: str) -> str | None:
    """The part that a module or parameter belongs to."""
    return next((part for part, pattern in _MODULES.items() if re.search(pattern, name)), None)


@cache
def _placed(code: CodeType) -> str | None:
    """The part that a function belongs to."""
    place = f"{code.co_filename}:{code.co_qualname}"
    return next((part for part, pattern in _PLACES.items() if re.search(pattern, place)), None)


def _on_gpu(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_cuda]


def _size(tensor: Tensor) -> int:
    """Bytes of memory behind it: what is expanded is there once."""
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
    """Of an operator; None where nobody has told."""
    formula = flop_registry.get(function.overloadpacket)
    return None if formula is None else int(formula(*args, **kwargs, out_val=out))


@cache
def _teach_flops() -> None:
    """A formula of an operator of PyTorch that it has none for itself; those of cuDNN have one where we call them."""

    def product(_: list[int], left: list[int], right: list[int], *__: object, **___: object) -> int:
        return 2 * prod(left) * right[-1]

    operators.count_flops("aten::_addmm_activation", product)


def by_short_name(kernels: Counter) -> dict[str, int]:
    """Launches by a kernel's name in a few words, most first."""
    found: Counter = Counter()
    for name, launches in kernels.items():
        found[short_name(name)] += launches
    return dict(found.most_common())


@cache
def short_name(name: str) -> str:
    """A kernel's name without namespaces and types; of a generic one, what it does in brackets.

    >>> short_name("_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEESt5arrayIPcLm1EEEEviT0_T1_")
    'vectorized_elementwise_kernel (FillFunctor)'
    """
    whole = _demangled(name)
    whole = re.sub(r"\w+::(?=\w)", "", whole.replace("(anonymous namespace)::", ""))
    words = [word for word in re.findall(r"[A-Za-z_]\w*", whole) if word not in _GENERIC]
    if not words:
        return name
    first, *rest = words
    telling = (word for word in rest if re.search(r"[fF]unctor|_cuda$|_kernel|_impl$|^launch_|Ops$", word))
    what = next((word for word in telling if word != first), None)
    return f"{first} ({what})" if what else first


def _demangled(name: str) -> str:
    """As the C++ library writes it; what is no mangled name stays."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    address = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return name
    text = ctypes.string_at(address).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    return text
