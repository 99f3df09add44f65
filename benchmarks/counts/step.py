"""What a training step, and inference, ask of a GPU: launches, waits, copies, memory, bytes, FLOPs, predicted time.

    python benchmarks/run.py step                                          # everything: half an hour, mostly Inductor's
    python benchmarks/run.py step --only ours hf --batch 8 --details
    python benchmarks/run.py step --only ours --before benchmarks/counts/before.json

R50 at 800×1066, bfloat16 autocast, 91 classes, 7 objects in each image, fused AdamW, gradients clipped. It runs on a
null GPU (tests/null_gpu), which computes nothing, each implementation in a process of its own: nothing here is
measured, and seconds are predicted (counting.py). HuggingFace's model is as its configuration comes, without auxiliary
losses, which ours has.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import conddetr
from conddetr.kernels import records
from conddetr.loss.targets import pack_targets
from harness.command import command
from harness.machine import commit

ROOT = Path(__file__).parents[2]

COUNTS = Path(__file__).parent
IMPLEMENTATIONS = {
    "ours": "ours",
    "ours-eager": "ours, eager (as the official code)",
    "ours-compiled": "ours, torch.compile",
    "hf": "HuggingFace",
    "hf-compiled": "HuggingFace, torch.compile",
    "hf-accelerated": "HuggingFace, accelerated by ours",
    "hf-graphed": "HuggingFace, accelerated, body as graphs",
}
AUTOCAST, HALF = "inference", "inference-bfloat16"
WORK = {"training": tuple(IMPLEMENTATIONS), AUTOCAST: ("ours", "hf"), HALF: ("ours", "hf")}
"""What is counted → of which implementations. Inference: one image, under autocast or by weights in bfloat16; ours is
the frozen copy that `DETR.fused` makes, under autocast the one that turns it on by itself.
"""
CLASSES, OBJECTS, SIZE = 91, 7, (800, 1066)
PACKAGES = ("torch", "triton", "transformers")
NOTE = (
    "Counted on a null GPU (tests/null_gpu), which computes nothing, by benchmarks/run.py step. Nothing is measured; "
    "what is predicted follows from bytes, FLOPs and launches at the rates in benchmarks/counts/counting.py."
)
console = Console(width=max(150, Console().width))
"""Wide enough for every column: on a narrower terminal lines wrap."""
Step = Callable[[], object]


@dataclass(frozen=True)
class Run:
    """What is counted in one process."""

    implementation: str
    work: str
    batch: int

    @property
    def title(self) -> str:
        """For tables."""
        return f"{IMPLEMENTATIONS[self.implementation]}, {self.work}, B = {self.batch}"

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Inference is in one autocast context throughout: where weights can have gradients, it casts them once.

        A training step must be in none, or what it casts would still be there in the next step.
        """
        if self.work == "training":
            yield
            return
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=self.work == AUTOCAST):
            yield


def make(run: Run) -> tuple[nn.Module, Step]:
    """The model on the GPU, and what is counted of it."""
    images = torch.randn(run.batch, 3, *SIZE, device="cuda", dtype=torch.bfloat16 if run.work == HALF else None)
    if run.implementation.startswith("ours"):
        return _ours(run, images)
    return _huggingface(run, images)


def _ours(run: Run, images: Tensor) -> tuple[nn.Module, Step]:
    backend = "eager" if run.implementation == "ours-eager" else "auto"
    model = conddetr.build("conditional-detr-r50", num_classes=CLASSES, backend=backend).to("cuda")
    if run.work != "training":
        model.eval().to(images.dtype)
        fused = model.fused(dtype=torch.bfloat16 if run.work == AUTOCAST else None)
        return fused, partial(fused, images)
    criterion = conddetr.build_criterion(model).to("cuda")
    targets = pack_targets(_objects(run.batch), CLASSES).to(torch.device("cuda"))

    def loss() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(images)
        return criterion(outputs, targets)["loss"]

    return _training(run, model, loss)


def _huggingface(run: Run, images: Tensor) -> tuple[nn.Module, Step]:
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection

    config = ConditionalDetrConfig(num_labels=CLASSES, use_pretrained_backbone=False)
    model = ConditionalDetrForObjectDetection(config).to("cuda")
    if run.work != "training":
        model.eval().to(images.dtype)
        return model, partial(model, images)
    if run.implementation in ("hf-accelerated", "hf-graphed"):
        conddetr.accelerate(model, graphs=run.implementation == "hf-graphed")
    objects = _objects(run.batch)
    labels = [{"class_labels": o["labels"].to("cuda"), "boxes": o["boxes"].to("cuda")} for o in objects]

    def loss() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(images, labels=labels).loss

    return _training(run, model, loss)


def _objects(batch: int) -> list[dict[str, Tensor]]:
    """Of each image, anywhere in it."""
    return [
        {"labels": torch.randint(CLASSES, (OBJECTS,)), "boxes": 0.1 + 0.4 * torch.rand(OBJECTS, 4)}
        for _ in range(batch)
    ]


def _training(run: Run, model: nn.Module, loss: Callable[[], Tensor]) -> tuple[nn.Module, Step]:
    model.train()
    if run.implementation.endswith("compiled"):
        model.compile()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()

    return model, step


@contextmanager
def _all_is_true() -> Iterator[None]:
    """`Tensor.all`, by which transformers asks, as a GPU answers it here: no image is padded, no box is wrong.

    The wait stays. A null GPU says no to everything, and transformers would raise errors.
    """
    ask = Tensor.all

    def answer(tensor: Tensor, *args: object, **options: object) -> Tensor:
        found = ask(tensor, *args, **options)
        if not tensor.is_cuda or found.dim() > 0:
            return found
        found.item()
        return torch.tensor(True)

    with mock.patch.object(Tensor, "all", answer):
        yield


def count(run: Run) -> dict:
    """Count one implementation in this process, which must have a null GPU; as it stands in the file."""
    import null_gpu
    import proven
    from null_gpu.counts import counted

    from counts.counting import Watch, by_short_name

    if not null_gpu.IS_RUNNING:
        raise RuntimeError("this process has no null GPU: start it by `python tests/null_gpu COMMAND`")
    # What a process has done before leaves pieces of memory.
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    # Nothing is proven on a null GPU: counted is a step with all kernels.
    everything = proven.everything(torch.device("cuda"))
    with records.pretend(everything), _all_is_true(), run.mode():
        model, step = make(run)
        # The first compiles, the second makes what is made once.
        for _ in range(2):
            step()
        with counted() as plain:
            step()
        with Watch(model) as watch, counted() as watched:
            step()
    operations = sorted(watch.by_operation.items(), key=lambda item: -item[1].seconds)
    total = {
        name: sum(getattr(cost, name) for _, cost in operations) for name in ("launches", "bytes", "flops", "seconds")
    }
    return {
        **asdict(run),
        "commit": commit(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "counted": {
            "launches": plain.launches + plain.graph_launches,
            "waits": plain.waits,
            "copies to the device": plain.to_device,
            "copies from the device": plain.from_device,
            "copies within the device": plain.within_device,
            "memsets": plain.memsets,
            # The allocator does not see what graphs use of their memory.
            "peak bytes": None if plain.graph_launches else plain.peak_bytes - before,
            "bytes moved": total["bytes"],
            "FLOPs": total["flops"],
            "launches of no known operation": watched.launches - total["launches"],
            "launches more when watched": watched.launches - plain.launches - plain.graph_launches,
        },
        "predicted": {"seconds on the device": total["seconds"]},
        "parts": {part: _written(cost) for part, cost in watch.by_part.items()},
        "operations": [{"operation": name, "dtype": dtype, **_written(cost)} for (name, dtype), cost in operations],
        "FLOPs not known": sorted(watch.without_formula),
        "kernels": by_short_name(plain.kernels),
    }


def _written(cost: object) -> dict:
    found = asdict(cost)
    seconds = found.pop("seconds")
    return {**found, "predicted seconds": float(f"{seconds:.4g}")}


def count_apart(run: Run) -> dict:
    """Count in a process of its own, on a null GPU.

    Raises:
        RuntimeError: there can be no null GPU here, or the process failed; says why.
    """
    import null_gpu

    environment = null_gpu.environment()
    # What Inductor times on a null GPU to choose by is nothing that a real one should find.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor"))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "counts.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "step", "--only", run.implementation]
        command += ["--work", run.work, "--batch", str(run.batch), "--here", str(result)]
        said = subprocess.run(command, env=environment, capture_output=True, text=True)
        if said.returncode or not result.exists():
            raise RuntimeError(f"{run.title}: {said.stderr[-2000:]}")
        return json.loads(result.read_text())


def read(path: Path) -> dict[Run, dict]:
    """The runs in a file."""
    return {Run(found["implementation"], found["work"], found["batch"]): found for found in _stored(path)}


def _stored(path: Path) -> list[dict]:
    return json.loads(path.read_text())["runs"] if path.exists() else []


def write(path: Path, runs: dict[Run, dict]) -> None:
    """One line for each operation and kernel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {"operations", "parts", "kernels"}

    def lines(found: dict) -> Iterator[str]:
        for name, value in found.items():
            if name not in lists:
                yield f"  {json.dumps(name)}: {json.dumps(value)}"
                continue
            items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
            inner = [(f"{json.dumps(key)}: " if key else "") + json.dumps(item) for key, item in items]
            begin, end = "{}" if isinstance(value, dict) else "[]"
            yield f"  {json.dumps(name)}: {begin}\n    " + ",\n    ".join(inner) + f"\n  {end}"

    blocks = ["{\n" + ",\n".join(lines(found)) + "\n}" for found in runs.values()]
    path.write_text(f'{{"note": {json.dumps(NOTE)},\n"runs": [\n' + ",\n".join(blocks) + "\n]}\n")


COLUMNS = {
    "launches": lambda found: f"{found['counted']['launches']:,}",
    "waits": lambda found: f"{found['counted']['waits']}",
    "copies to / from / within": lambda found: " / ".join(
        str(found["counted"][f"copies {where} the device"]) for where in ("to", "from", "within")
    ),
    "memsets": lambda found: f"{found['counted']['memsets']}",
    "peak, GiB": lambda found: _gibibytes(found["counted"]["peak bytes"]),
    "moved, GiB": lambda found: _seen(found, f"{found['counted']['bytes moved'] / 2**30:.1f}"),
    "TFLOP": lambda found: _seen(found, f"{found['counted']['FLOPs'] / 1e12:.2f}"),
    "predicted, ms": lambda found: _seen(found, f"{1e3 * found['predicted']['seconds on the device']:.1f}"),
}


def _gibibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**30:.2f}"


def _seen(found: dict, figure: str) -> str:
    """The figure; – where operations could not be told, or are others when they are watched."""
    counted = found["counted"]
    return "–" if counted["launches of no known operation"] or counted["launches more when watched"] else figure


def show(runs: dict[Run, dict], before: dict[Run, dict], details: bool) -> None:
    """Tables for the terminal, with what was before, where that is given."""

    def cell(run: Run, figure: Callable[[dict], str]) -> str:
        now, then = figure(runs[run]), figure(before[run]) if run in before else None
        return now if then in (None, now) else f"{then} → {now}"

    table = Table(
        title="Counted on a null GPU, time predicted; a graph is one launch, clearing of memory (memsets) is none"
    )
    table.add_column("implementation", min_width=30)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(run.title, *(cell(run, figure) for figure in COLUMNS.values()))
    console.print(table)
    from counts.counting import PARTS

    parts = [part for part in PARTS if any(part in found["parts"] for found in runs.values())]
    table = Table(title="By part, forward and backward together: launches, predicted ms")
    table.add_column("implementation", min_width=30)
    for part in parts:
        table.add_column(part, justify="right")
    for run in runs:
        table.add_row(run.title, *(cell(run, partial(_part, part=part)) for part in parts))
    console.print(table)
    for run, found in runs.items() if details else ():
        _show_details(run, found)


def _part(found: dict, part: str) -> str:
    cost = found["parts"].get(part)
    return "–" if cost is None else _seen(found, f"{cost['launches']:,}, {1e3 * cost['predicted seconds']:.2f}")


def _show_details(run: Run, found: dict) -> None:
    table = Table(title=f"{run.title}: operations")
    for name in ("operation", "dtype", "calls", "launches", "waits", "GiB", "GFLOP", "predicted, ms"):
        table.add_column(name, justify="left" if name in ("operation", "dtype") else "right")
    for row in found["operations"]:
        numbers = (row["bytes"] / 2**30, row["flops"] / 1e9, 1e3 * row["predicted seconds"])
        counts = (str(row[name]) for name in ("calls", "launches", "waits"))
        table.add_row(escape(row["operation"]), row["dtype"], *counts, *(f"{number:.2f}" for number in numbers))
    console.print(table)
    if found["FLOPs not known"]:
        console.print(f"by bytes alone, FLOPs not known: {', '.join(found['FLOPs not known'])}", highlight=False)
    table = Table("launches", "kernel", title=f"{run.title}: kernels")
    for name, launches in found["kernels"].items():
        table.add_row(str(launches), escape(name))
    console.print(table)


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = command("step", __doc__)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 2], help="of training; default 8 and 2")
    parser.add_argument("--before", type=Path, help="a file that this wrote before, to be shown beside")
    parser.add_argument("--details", action="store_true", help="every operation and kernel, not only in the file")
    parser.add_argument(
        "--out",
        type=Path,
        default=COUNTS / "step.json",
        help="what is not counted anew stays there; default %(default)s",
    )
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    return parser


def chosen(options: argparse.Namespace) -> list[Run]:
    """What the options ask for; inference is of one image."""
    runs = [Run(name, work, batch) for work, batch, name in product(options.work, options.batch, options.only)]
    runs = [run if run.work == "training" else Run(run.implementation, run.work, 1) for run in runs]
    return [run for run in dict.fromkeys(runs) if run.implementation in WORK[run.work]]


def main(words: list[str]) -> int:
    """Count all that is asked for; 1 where something failed."""
    # The tests have it on their path.
    sys.path.append(str(ROOT / "tests"))
    import null_gpu

    parser = arguments()
    options = parser.parse_args(words)
    runs = chosen(options)
    if options.here:
        options.here.write_text(json.dumps(count(runs[0])))
        return 0
    reason = null_gpu.why_not()
    if reason is not None:
        parser.error(reason)
    if options.before and not options.before.exists():
        parser.error(f"--before: there is no {options.before}")
    found, failed = {}, 0
    for run in runs:
        with console.status(f"{run.title} …"):
            try:
                found[run] = count_apart(run)
            except RuntimeError as error:
                console.print(f"failed: {error}", style="red", markup=False)
                failed = 1
        write(options.out, {**read(options.out), **found})
    show(found, read(options.before) if options.before else {}, options.details)
    return failed
