"""Training steps of whole models: official-style, HuggingFace's and ours, on the same weights, images and objects.

    python benchmarks/train.py
    python benchmarks/train.py --presets conditional-detr-dc5-r50 detr-r50 --batch 4
    python benchmarks/train.py --compiled                # torch.compile too: minutes more

The official-style step is our plain PyTorch, which the tests compare with the official numbers. It uses PyTorch's
defaults (but float32 without TF32) and reads every loss, as the official loop does. All train the same parameters.
Losses are compared without dropout before anything is timed; steps are timed with dropout 0.1. The time of each part is
measured in separate steps.
"""

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median
from typing import Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import conddetr
from conddetr.config.run import TrainConfig
from conddetr.data.batch import Batch, collate
from conddetr.engine.step import Stepper
from conddetr.interop import convert_to_huggingface
from conddetr.kernels import registry
from harness.machine import DEVICE, dtype_name, is_null_gpu
from harness.memory import allocated_by, with_host_memory
from harness.parts import Parts
from harness.problem import Timed
from harness.rates import product_rate
from harness.refusals import OURS, WRONG, RefusedError, refusing
from harness.result import Result, Work
from harness.show import NOT_COMPARED, console
from harness.timing import measure
from models.model import spread_outputs

OBJECTS = 7
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Largest relative difference of a loss."""
BREAKDOWN_STEPS = 3


@dataclass(frozen=True)
class Problem(Timed):
    """One size: the model, and its batch."""

    preset: str
    batch: int
    size: tuple[int, int]
    dtype: torch.dtype
    compiled: bool = False
    """torch.compile too."""

    seconds = 180

    @property
    def title(self) -> str:
        shape = f"{self.batch}×3×{self.size[0]}×{self.size[1]}"
        return f"{self.preset}, training step, {shape}, {dtype_name(self.dtype)}"

    def make(self) -> Batch:
        """Noise images of the full batch size, with random objects; in pinned memory if there is a GPU."""
        generator = torch.Generator().manual_seed(0)
        samples = []
        for number in range(self.batch):
            image = torch.randint(256, (3, *self.size), dtype=torch.uint8, generator=generator)
            labels = torch.randint(91, (OBJECTS,), generator=generator)
            boxes = 0.1 + 0.3 * torch.rand(OBJECTS, 4, generator=generator) + torch.tensor([0.25, 0.25, 0.0, 0.0])
            samples.append((image, {"labels": labels, "boxes": boxes, "image_id": number, "original_size": self.size}))
        batch = collate(samples)
        return batch.pin_memory() if DEVICE.type == "cuda" else batch

    def work(self) -> Work:
        """Products of forward and backward as the paper writes the model, counted on fake tensors."""
        with FakeTensorMode():
            model = conddetr.build(self.preset, backend="eager")
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                output = model(torch.empty(self.batch, 3, *self.size))
                layers = [output, *output["aux_outputs"]]
                sum(layer[name].sum() for layer in layers for name in ("pred_logits", "pred_boxes")).backward()
        flops = counter.get_total_flops()
        return Work(flops, 0, {"products": flops / product_rate(self.dtype)})

    def autocast(self) -> torch.autocast:
        """Autocast to bfloat16 if the problem is in bfloat16."""
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def measured(self, options: argparse.Namespace) -> Result:
        torch.compiler.reset()
        made, refused = implementations(self, self.make(), self.compiled)
        runs = {name: trained.step for name, trained in alike(made, self.dtype, refused).items()}
        result = with_host_memory(measure(self.title, runs, options, self.work(), refused), runs)
        result, parts = with_capture_memory(result, made), {}
        # Hooks inside a compiled model would break its graph; a replayed CUDA graph calls none.
        whole = [name for name in result.seconds if "compiled" not in name and name not in result.captured]
        for name in whole:
            with refusing(f"{name}, its parts", result.refused):
                parts[name] = breakdown(made[name])
        return replace(result, images=self.batch, parts=parts)

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        cuda = DEVICE.type == "cuda"
        size = [800, 1066] if cuda else [480, 640]
        parser.add_argument("--presets", nargs="+", choices=list(conddetr.presets()), default=["conditional-detr-r50"])
        parser.add_argument("--size", type=int, nargs=2, default=size, metavar=("H", "W"))
        parser.add_argument("--batch", type=int, nargs="+", default=[8, 16] if cuda else [2])
        parser.add_argument("--dtypes", nargs="+", default=["bfloat16"] if cuda else ["float32"])
        parser.add_argument("--compiled", action="store_true", help="torch.compile of HuggingFace's and of ours too")

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every preset in every dtype with every number of images."""
        if options.cudagraph:
            raise RefusedError("--cudagraph: this benchmark does not capture whole steps")
        return [
            cls(preset, batch, tuple(options.size), getattr(torch, dtype), options.compiled)
            for preset, dtype, batch in product(options.presets, options.dtypes, options.batch)
        ]


@dataclass(frozen=True)
class Trained:
    """One implementation."""

    model: nn.Module
    losses: Callable[[], dict[str, Tensor]]
    """Unweighted losses by layer, with the names of `Criterion`."""
    step: Callable[[], object]
    optimizer: torch.optim.Optimizer
    recorded: dict | None = None
    """Its CUDA graphs in `StepGraphs`; None: it captures nothing."""

    def parts(self) -> dict[str, nn.Module]:
        """Backbone, encoder and decoder."""
        inner = self.model.transformer if isinstance(self.model, conddetr.DETR) else self.model.model
        backbone = self.model.backbone if isinstance(self.model, conddetr.DETR) else inner.backbone
        return {"backbone": backbone, "encoder": inner.encoder, "decoder": inner.decoder}


def our_losses(model: conddetr.DETR, problem: Problem, batch: Batch) -> dict[str, Tensor]:
    """Losses of our model, by the criterion of its backend."""
    criterion = conddetr.build_criterion(model).to(DEVICE)
    with problem.autocast():
        outputs = model(batch.to(DEVICE).model_input(), valid_hw=batch.valid_hw)
    return criterion(outputs, batch.targets)


def huggingface_losses(peer: nn.Module, problem: Problem, batch: Batch) -> dict[str, Tensor]:
    """Losses of transformers' model, by its own loss."""
    labels = [{"class_labels": t["labels"].to(DEVICE), "boxes": t["boxes"].to(DEVICE)} for t in batch.targets]
    mask = torch.ones(len(batch), *batch.images.shape[-2:], dtype=torch.int64, device=DEVICE)
    with problem.autocast():
        out = peer(pixel_values=batch.to(DEVICE).model_input(), pixel_mask=mask, labels=labels)
    return {"loss": out.loss, **out.loss_dict}


def plain(model: nn.Module, losses: Callable[[], dict[str, Tensor]], looks: bool, fused: bool) -> Trained:
    """A plain training loop.

    Args:
        model: to be trained.
        losses: returns the losses, including the total.
        looks: whether the host reads each loss and waits for it, as the official loop does.
        fused: AdamW's fused kernel, as in transformers' Trainer; the official code uses PyTorch's default.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-4, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        loss = losses()["loss"]
        if looks and not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()

    return Trained(model, losses, step, optimizer)


FORMS = {"": {}, "without CUDA graphs": {"cuda_graphs": "off"}, "compiled": {"compile": True}}
"""Changes to the defaults of `TrainConfig`."""


def ours(model: conddetr.DETR, problem: Problem, batch: Batch, form: str = "") -> Trained:
    """The step of `conddetr train`, in one of `FORMS`; the first is the default."""
    precision = "bfloat16" if problem.dtype == torch.bfloat16 else "float32"
    config = TrainConfig(lr=1e-5, precision=precision, **FORMS[form])
    stepper = Stepper(model, config, DEVICE, steps_per_epoch=1)
    losses = partial(our_losses, model, problem, batch)
    recorded = stepper.graphs and stepper.graphs.recorded
    return Trained(model, losses, lambda: stepper([batch], 0), stepper.optimizer, recorded)


def implementations(problem: Problem, batch: Batch, compiled: bool) -> tuple[dict[str, Trained], dict[str, str]]:
    """Name → implementation, all with the same weights; and name → reason of those that are left out.

    The first is the official one. `ours` is the default; the backend that it picks has no separate row.
    """
    reference = conddetr.build(problem.preset, backend="eager")
    spread_outputs(reference)
    reference = reference.to(DEVICE)
    refused = {}
    made = {"official-style eager": plain(reference, partial(our_losses, reference, problem, batch), True, False)}
    for name, peer in huggingface(reference, compiled, refused).items():
        made[name] = plain(peer, partial(huggingface_losses, peer, problem, batch), False, True)
    state = reference.state_dict()
    forms = ["", *["without CUDA graphs"] * (DEVICE.type == "cuda"), *["compiled"] * compiled]
    by_default = registry.OPERATIONS["conditional_attention"].choose("auto", DEVICE, problem.dtype).backend
    for backend in ("auto", *(name for name in registry.BACKENDS if name not in ("eager", by_default))):
        title = OURS if backend == "auto" else f"{OURS}, {backend}"
        with refusing(title, refused):
            registry.OPERATIONS["conditional_attention"].choose(backend, DEVICE, problem.dtype)
            for form in forms:
                model = conddetr.build(problem.preset, backend=backend).to(DEVICE)
                model.load_state_dict(state)
                made[", ".join(filter(None, (title, form)))] = ours(model, problem, batch, form)
    return made, refused


def huggingface(reference: conddetr.DETR, compiled: bool, refused: dict[str, str]) -> dict[str, nn.Module]:
    """transformers' model with each of its attentions, and accelerated; those that fail go to `refused`."""
    made = {}
    with refusing("HuggingFace", refused):
        peer = huggingface_peer(reference)
        made["HuggingFace, eager attention"], made["HuggingFace, sdpa"] = copy.deepcopy(peer), copy.deepcopy(peer)
        made["HuggingFace, eager attention"].set_attn_implementation("eager")
        made["HuggingFace, sdpa"].set_attn_implementation("sdpa")
        if compiled:
            made["HuggingFace, sdpa, compiled"] = copy.deepcopy(made["HuggingFace, sdpa"])
            made["HuggingFace, sdpa, compiled"].compile(dynamic=False)
        accelerated = f"{OURS}, HuggingFace accelerated"
        with refusing(accelerated, refused):
            conddetr.accelerate(peer)
            made[accelerated] = peer
    return made


def huggingface_peer(reference: conddetr.DETR) -> nn.Module:
    """transformers' model with the same weights and the same frozen parameters."""
    peer, _ = convert_to_huggingface(reference)
    peer.config.auxiliary_loss = True
    for name, parameter in peer.named_parameters():
        is_frozen = ".backbone." in name and not any(f".layer{stage}." in name for stage in (2, 3, 4))
        parameter.requires_grad_(not is_frozen)
    return peer


def alike(made: dict[str, Trained], dtype: torch.dtype, refused: dict[str, str]) -> dict[str, Trained]:
    """Implementations that train as many parameters as the first and have its losses; the others go to `refused`."""
    first, *_ = made.values()
    expected, size, good = evaluated(first), trained_size(first), {}
    for name, trained in made.items():
        with refusing(name, refused):
            if trained_size(trained) != size:
                raise RefusedError(f"{WRONG}expected {size} trained parameters, got {trained_size(trained)}")
            worst = check(expected, evaluated(trained), TOLERANCE[dtype])
            console.print(f"  {name}: {worst}", highlight=False)
            good[name] = trained
    return good


def trained_size(trained: Trained) -> int:
    """Number of parameters that its optimizer updates."""
    return sum(p.numel() for group in trained.optimizer.param_groups for p in group["params"])


@torch.no_grad()
def evaluated(trained: Trained) -> dict[str, float]:
    """Losses of all layers, without dropout."""
    trained.model.eval()
    losses = {name: loss.double().item() for name, loss in trained.losses().items() if name.startswith("loss_")}
    trained.model.train()
    return losses


def check(expected: dict[str, float], losses: dict[str, float], tolerance: float) -> str:
    """The loss that differs most, as text.

    Raises:
        RefusedError: it differs by more than `tolerance`, relatively.
    """
    if is_null_gpu():
        return NOT_COMPARED
    differences = {name: abs(losses[name] - value) / abs(value) for name, value in expected.items()}
    worst = max(differences, key=differences.get)
    if not differences[worst] <= tolerance:
        raise RefusedError(f"{WRONG}{worst}: expected {expected[worst]:.6g}, got {losses[worst]:.6g}")
    return f"largest relative difference {differences[worst]:.1e}, of {worst}"


def breakdown(trained: Trained) -> dict[str, float]:
    """Part → seconds, the median of a few steps."""
    parts = Parts(trained.parts(), trained.optimizer)
    try:
        samples = [parts.time(trained.step) for _ in range(BREAKDOWN_STEPS)]
    finally:
        parts.remove()
    return {name: median(sample[name] for sample in samples) for name in samples[0]}


def with_capture_memory(result: Result, made: dict[str, Trained]) -> Result:
    """The result, with the memory of warm-up and capture for implementations that replay graphs."""
    captured = [name for name in result.seconds if made[name].recorded is not None]
    peaks = {name: peak for name, peak in result.peak_extra_bytes.items() if name not in captured}
    for name in captured:
        with refusing(f"{name}, its memory", result.refused):
            # Kept until the next capture: without any graph PyTorch releases the memory pool that all graphs share, and
            # no longer captures into it.
            before = dict(made[name].recorded)
            made[name].recorded.clear()
            torch.cuda.synchronize()
            peaks[name] = allocated_by(made[name].step)
            del before
    return replace(result, peak_extra_bytes=peaks, captured=captured)
