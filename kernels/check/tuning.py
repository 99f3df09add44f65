"""Tries the few launch settings of attention that the model of the machine ranks first, and keeps the fastest right
one of each kernel and form.

Settings are tried as they are used later: a record of this device has them, here a pretended one.
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
"""That the settings of one kernel in one form are timed for, all together."""
CALLS = 10
"""In one CUDA graph, so that the host's part in a launch does not count."""
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Choice:
    """The fastest settings of one kernel in one form."""

    form: Form
    kernel: str
    fastest: Tiles
    shipped: Tiles
    speedup: float | None
    """Of the pass that the kernel is part of, over what ships; None: what ships is not right here."""


@dataclass
class Tuning:
    """What was found: nothing is recorded of what is not among the choices."""

    choices: list[Choice] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """A line for all that was not taken, with the reason."""

    def settings(self) -> dict[str, Any]:
        """As a record has them."""
        return {choice.form.key(choice.kernel): launch.write_tiles(choice.fastest) for choice in self.choices}

    def refuse(self, reason: str) -> None:
        """Take nothing of it."""
        self.choices.clear()
        self.left_out.append(f"no setting is tuned: {reason}")


@dataclass(frozen=True)
class Subject:
    """One form of attention at a size of the model."""

    problem: Problem
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """For a person who waits."""
        return f"{self.problem.title}, {str(self.dtype).removeprefix('torch.')}"

    def inputs(self, device: torch.device) -> triton.Inputs:
        """For its kernels."""
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
    """All forms, in the dtypes that are wanted and that the kernels take: float32 with TF32, of the two of 16 bits one,
    since both run the same machine code; with few blocks for each multiprocessor and with many.
    """
    half = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes]
    wanted = [*half, *[torch.float32] * (torch.float32 in dtypes)]
    taken = [dtype for dtype in wanted if op.OPERATION.why_not("triton", device, dtype) is None]
    chosen = [dtype for dtype in taken if dtype != torch.float16 or torch.bfloat16 not in taken]
    return [
        Subject(replace(problem, is_tf32=dtype == torch.float32), dtype)
        for dtype in chosen
        for images in _batches(device)
        for problem in attention.forms(images)
    ]


def _batches(device: torch.device) -> tuple[int, int]:
    """Images of the model's batch, and of another one that is crowded if that is not, or the other way round."""
    blocks = attention.HEADS * cdiv(attention.QUERIES, 64)
    limit = 3 * registry.multiprocessors(device)
    images = IMAGES["cuda"]
    return images, 1 if images * blocks > limit else limit // blocks + 1


def tune(device: torch.device, dtypes: Sequence[torch.dtype], tell: Tell) -> Tuning:
    """Try the candidates of every kernel in every form.

    Args:
        device: a GPU.
        dtypes: that matter.
        tell: takes what is being done, and of how many steps how many are done.
    """
    found = Tuning()
    wanted = subjects(device, dtypes)
    for number, subject in enumerate(wanted):
        tell(f"tuning attention, {subject.title}", number, len(wanted))
        try:
            choices, raised = attempt(partial(_tune, subject, device, found.left_out))
        except registry.BackendError as error:
            choices, raised = [], str(error)
        except torch.OutOfMemoryError:
            choices, raised = [], "the GPU has no memory left for it."
        found.choices += choices or []
        found.left_out += [f"attention, {subject.title}: {raised}"] if raised is not None else []
    return found


def _tune(subject: Subject, device: torch.device, left_out: list[str]) -> list[Choice]:
    """Of one form: the fastest right setting of each kernel, all of which are right together."""
    with products("tf32" if subject.problem.is_tf32 else "ieee"):
        inputs = subject.inputs(device)
        # What ships, whatever a record of before has tuned.
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
    """The choice of one kernel; None: no setting is right."""
    device, today = inputs.v.device, getattr(shipped, kernel)
    ways: dict[Tiles, Callable[[], object]] = {}
    for tiles in settings_of(device, form, kernel, today):
        key = form.key(kernel)
        wrong = _why_wrong(subject, device, {key: launch.write_tiles(tiles)})
        if wrong is None:
            settings = replace(shipped, **{kernel: tiles})
            way, wrong = attempt(lambda settings=settings: _captured(_pass(inputs, kernel, settings), device))
        if wrong is None:
            ways[tiles] = way
        else:
            left_out.append(f"{key}: {tiles.described()}: {wrong}")
    if not ways:
        return None
    times, raised = attempt(lambda: seconds_of(list(ways.values()), device))
    if raised is not None:
        left_out.append(f"{form.key(kernel)}: to measure it {raised}")
        return None
    seconds = dict(zip(ways, times, strict=True))
    fastest = min(seconds, key=seconds.get)
    speedup = seconds[today] / seconds[fastest] if today in seconds else None
    return Choice(form, kernel, fastest, today, speedup)


def settings_of(device: torch.device, form: Form, kernel: str, shipped: Tiles) -> list[Tiles]:
    """What to try: first what ships."""
    major, minor = registry.capability(device)
    return list(dict.fromkeys((shipped, *launch.candidates(10 * major + minor, kernel, form))))


def _why_wrong(subject: Subject, device: torch.device, settings: dict[str, Any]) -> str | None:
    """What is wrong where a record has these settings; None: nothing."""
    with in_effect(device, settings):
        return verify(subject.problem, "triton", subject.dtype, device).wrong


@contextmanager
def in_effect(device: torch.device, settings: dict[str, Any]) -> Iterator[None]:
    """As if a record of this device had these settings; its verdicts stay."""
    before = records.load(device)
    if before is None:
        before = Record(records.identity(device), (), False, datetime.now(UTC).isoformat(), {})
    with records.pretend(replace(before, tuned=settings)):
        yield


def launch_all(subject: Subject, kernel: str, device: torch.device) -> None:
    """Launch a kernel once with each of its settings, which compiles it; errors are found when they are tried."""
    with products("tf32" if subject.problem.is_tf32 else "ieee"):
        inputs = subject.inputs(device)
        shipped = inputs.launch()
        for tiles in settings_of(device, Form(*inputs.form()), kernel, getattr(shipped, kernel)):
            attempt(lambda tiles=tiles: _pass(inputs, kernel, replace(shipped, **{kernel: tiles}))())


def _pass(inputs: triton.Inputs, kernel: str, settings: Launch) -> Callable[[], object]:
    """The pass that a kernel is part of."""
    if kernel == "forward":
        return lambda: triton.forward(inputs, settings)
    out, lse = triton.forward(inputs)
    # The gradient from above may be anything of this shape.
    return lambda: triton.backward(inputs, out, out, lse, settings)


def _captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU the same several times, in a CUDA graph."""
    if device.type != "cuda":
        return run
    # What is made once is made outside of the graph.
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph.replay


def seconds_of(ways: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Typical seconds of each, all of them measured in turn."""
    return [median(times) for times in measurements(ways, device, SECONDS)]
