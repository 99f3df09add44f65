"""Tries the few launch settings of attention that the model of the machine ranks first, and keeps the fastest correct
setting of each kernel and variant.

Settings are tried the way they are used later, through a record of this device, here a temporary one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import records, registry
from conddetr.kernels.attn import op, triton
from conddetr.kernels.attn.inputs import bits_shape
from conddetr.kernels.attn.triton import launch
from conddetr.kernels.attn.triton.launch import KERNELS, Form, Launch, Tiles
from conddetr.kernels.bits import dropout_bits
from conddetr.kernels.check.attempt import attempt
from conddetr.kernels.check.cases import IMAGES, attention
from conddetr.kernels.check.clock import measurements
from conddetr.kernels.check.inputs import Inputs, Maker
from conddetr.kernels.check.isolation import products
from conddetr.kernels.check.problem import Problem
from conddetr.kernels.check.verify import verify
from conddetr.kernels.common.launch import cdiv
from conddetr.kernels.records import Record

SECONDS = 0.1
"""Duration of the timing of all settings of one kernel in one variant."""
CALLS = 10
"""Calls in one CUDA graph, which excludes the host's launch overhead."""
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Choice:
    """The fastest settings of one kernel in one variant."""

    form: Form
    kernel: str
    fastest: Tiles
    shipped: Tiles
    speedup: float | None
    """Speed-up of the kernel's pass over the shipped settings; None: the shipped settings are not correct here."""


@dataclass
class Tuning:
    """Result of tuning: only the choices are recorded."""

    choices: list[Choice] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """A line with the reason for each setting or variant that was rejected."""

    def settings(self) -> dict[str, Any]:
        """The choices in the format of a record."""
        return {choice.form.key(choice.kernel): launch.write_tiles(choice.fastest) for choice in self.choices}

    def refuse(self, reason: str) -> None:
        """Discard all choices."""
        self.choices.clear()
        self.left_out.append(f"no setting is tuned: {reason}")


@dataclass(frozen=True)
class Subject:
    """One variant of attention at a size of the model."""

    problem: Problem
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """Name that the progress display shows."""
        return f"{self.problem.title}, {str(self.dtype).removeprefix('torch.')}"

    def inputs(self, device: torch.device) -> triton.Inputs:
        """Inputs of the subject's kernels."""
        made = self.problem.make(Maker(device, self.dtype))
        is_separable = "rows" in self.problem.gradients
        dropout_p = 0.0 if self.problem.dropout is None else self.problem.dropout.p
        return triton.Inputs(
            q_content=made["q_content"],
            q_spatial=made["q_spatial"],
            k_content=made["k_content"],
            k_spatial=made["rows" if is_separable else "k_spatial"],
            columns=made["columns"] if is_separable else None,
            v=made["v"],
            valid_cells=made["valid"] if is_separable else None,
            key_padding_mask=None if is_separable else made["padding"],
            keep=_keep(made) if dropout_p > 0 else None,
            scale=(made["q_content"].shape[-1] + made["q_spatial"].shape[-1]) ** -0.5,
            dropout_p=dropout_p,
        )


def _keep(made: Inputs) -> Tensor:
    batch, queries, heads, _ = made["q_content"].shape
    return dropout_bits(made["seed"], bits_shape(batch, heads, queries, made["v"].shape[1]), attention.P, "eager")


def subjects(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Subject]:
    """All variants, in the requested dtypes that the kernels support: float32 with TF32, and only one of the two 16-bit
    dtypes, since both run the same machine code. Each with few blocks per multiprocessor and with many.
    """
    half = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes]
    wanted = [*half, *[torch.float32] * (torch.float32 in dtypes)]
    supported = [dtype for dtype in wanted if op.OPERATION.why_not("triton", device, dtype) is None]
    chosen = [dtype for dtype in supported if dtype != torch.float16 or torch.bfloat16 not in supported]
    return [
        Subject(replace(problem, is_tf32=dtype == torch.float32), dtype)
        for dtype in chosen
        for images in _batches(device)
        for problem in attention.forms(images)
    ]


def _batches(device: torch.device) -> tuple[int, int]:
    """Images of the model's batch, and of a second batch: one of the two has few blocks, the other many."""
    blocks = attention.HEADS * cdiv(attention.QUERIES, 64)
    limit = 3 * registry.multiprocessors(device)
    images = IMAGES["cuda"]
    return images, 1 if images * blocks > limit else limit // blocks + 1


def tune(device: torch.device, dtypes: Sequence[torch.dtype], tell: Tell) -> Tuning:
    """Try the candidates of every kernel in every variant.

    Args:
        device: a GPU.
        dtypes: the dtypes to tune.
        tell: takes the name of the current step, the number of finished steps and their total.
    """
    tuning = Tuning()
    wanted = subjects(device, dtypes)
    for number, subject in enumerate(wanted):
        tell(f"tuning attention, {subject.title}", number, len(wanted))
        try:
            choices, raised = attempt(partial(_tune, subject, device, tuning.left_out))
        except registry.BackendError as error:
            choices, raised = [], str(error)
        except torch.OutOfMemoryError:
            choices, raised = [], "the GPU has no memory left for it."
        tuning.choices += choices or []
        tuning.left_out += [f"attention, {subject.title}: {raised}"] if raised is not None else []
    return tuning


def _tune(subject: Subject, device: torch.device, left_out: list[str]) -> list[Choice]:
    """The fastest correct setting of each kernel in one variant, if all of them together are correct too."""
    with products("tf32" if subject.problem.is_tf32 else "ieee"):
        inputs = subject.inputs(device)
        # The shipped settings, even if an earlier record has tuned ones.
        with in_effect(device, {}):
            shipped, form = inputs.launch(), Form(*inputs.form())
        choices = [_fastest(subject, inputs, form, kernel, shipped, left_out) for kernel in KERNELS]
    chosen = [choice for choice in choices if choice is not None]
    together = Tuning(chosen).settings()
    wrong = _why_wrong(subject, device, together) if together else None
    if wrong is not None:
        left_out.append(f"{form.key('with the fastest of each kernel')}: {wrong}")
        return []
    return chosen


def _fastest(
    subject: Subject, inputs: triton.Inputs, form: Form, kernel: str, shipped: Launch, left_out: list[str]
) -> Choice | None:
    """The choice of one kernel; None: no setting is correct."""
    device, default = inputs.v.device, getattr(shipped, kernel)
    runs: dict[Tiles, Callable[[], object]] = {}
    for tiles in settings_of(device, form, kernel, default):
        key = form.key(kernel)
        wrong = _why_wrong(subject, device, {key: launch.write_tiles(tiles)})
        if wrong is None:
            settings = replace(shipped, **{kernel: tiles})
            run, wrong = attempt(lambda settings=settings: _captured(_pass(inputs, kernel, settings), device))
        if wrong is None:
            runs[tiles] = run
        else:
            left_out.append(f"{key}: {tiles.described()}: {wrong}")
    if not runs:
        return None
    times, raised = attempt(lambda: seconds_of(list(runs.values()), device))
    if raised is not None:
        left_out.append(f"{form.key(kernel)}: the measurement {raised}")
        return None
    seconds = dict(zip(runs, times, strict=True))
    fastest = min(seconds, key=seconds.get)
    speedup = seconds[default] / seconds[fastest] if default in seconds else None
    return Choice(form, kernel, fastest, default, speedup)


def settings_of(device: torch.device, form: Form, kernel: str, shipped: Tiles) -> list[Tiles]:
    """The settings to try, the shipped ones first."""
    major, minor = registry.capability(device)
    return list(dict.fromkeys((shipped, *launch.candidates(10 * major + minor, kernel, form))))


def _why_wrong(subject: Subject, device: torch.device, settings: dict[str, Any]) -> str | None:
    """The fault of these settings in a record; None: they are correct."""
    with in_effect(device, settings):
        return verify(subject.problem, "triton", subject.dtype, device).wrong


@contextmanager
def in_effect(device: torch.device, settings: dict[str, Any]) -> Iterator[None]:
    """Use these settings as if the device's record had them; its verdicts stay."""
    before = records.load(device)
    if before is None:
        before = Record(records.identity(device), (), False, datetime.now(UTC).isoformat(), {})
    with records.pretend(replace(before, tuned=settings)):
        yield


def launch_all(subject: Subject, kernel: str, device: torch.device) -> None:
    """Launch a kernel once with each of its settings, which compiles it; `tune` reports errors later."""
    with products("tf32" if subject.problem.is_tf32 else "ieee"):
        inputs = subject.inputs(device)
        shipped = inputs.launch()
        for tiles in settings_of(device, Form(*inputs.form()), kernel, getattr(shipped, kernel)):
            attempt(lambda tiles=tiles: _pass(inputs, kernel, replace(shipped, **{kernel: tiles}))())


def _pass(inputs: triton.Inputs, kernel: str, settings: Launch) -> Callable[[], object]:
    """The pass that contains a kernel."""
    if kernel == "forward":
        return lambda: triton.forward(inputs, settings)
    out, lse = triton.forward(inputs)
    # The upstream gradient may be any tensor of this shape.
    return lambda: triton.backward(inputs, out, out, lse, settings)


def _captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU, a CUDA graph of several calls."""
    if device.type != "cuda":
        return run
    # Caches are set up outside the graph.
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph.replay


def seconds_of(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Median seconds of each run, measured in turn."""
    return [median(times) for times in measurements(runs, device, SECONDS)]
