"""Cost of training steps and inference on a GPU: launches, waits, copies, memory, bytes, FLOPs, predicted time.

    python benchmarks/run.py step                                          # everything: half an hour, mostly Inductor's
    python benchmarks/run.py step --only ours hf --batch 8 --details
    python benchmarks/run.py step --only ours --before benchmarks/counts/before.json

R50 at 800×1066, bfloat16 autocast, 91 classes, 7 objects per image, fused AdamW, gradients clipped. It runs on a null
GPU (tests/null_gpu), which computes nothing, each implementation in a separate process: nothing here is measured, and
seconds are predicted (counting.py). HuggingFace's model has its default configuration, without the auxiliary losses
that ours has.
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
"""Work → counted implementations. Inference: one image, under autocast or with bfloat16 weights. Ours is the frozen
copy of `DETR.fused`; the one for autocast turns autocast on automatically.
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
    """The work that one process counts."""

    implementation: str
    work: str
    batch: int

    @property
    def title(self) -> str:
        """Name in tables."""
        return f"{IMPLEMENTATIONS[self.implementation]}, {self.work}, B = {self.batch}"

    @contextmanager
    def mode(self) -> Iterator[None]:
        """One autocast context for all of inference: it caches the casts of weights that require gradients.

        A training step must not run in one: casts of one step would still be cached in the next.
        """
        if self.work == "training":
            yield
            return
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=self.work == AUTOCAST):
            yield


def make(run: Run) -> tuple[nn.Module, Step]:
    """The model on the GPU, and the step to count."""
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
    """Objects of each image, at random positions."""
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
    """`Tensor.all` returns True, as on a real GPU in transformers' checks: no image is padded, no box is wrong.

    The wait stays. On a null GPU it would return False, and transformers would raise errors.
    """
    original = Tensor.all

    def answer(tensor: Tensor, *args: object, **options: object) -> Tensor:
        result = original(tensor, *args, **options)
        if not tensor.is_cuda or result.dim() > 0:
            return result
        result.item()
        return torch.tensor(True)

    with mock.patch.object(Tensor, "all", answer):
        yield


def count(run: Run) -> dict:
    """Count one implementation in this process, which must have a null GPU; returns the entry of the file."""
    import null_gpu
    import proven
    from null_gpu.counts import counted

    from counts.counting import Watch, by_short_name

    if not null_gpu.IS_RUNNING:
        raise RuntimeError("this process has no null GPU: start it by `python tests/null_gpu COMMAND`")
    # Earlier work of the process leaves allocated memory.
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    # No kernel is proven on a null GPU; the counted step uses all of them.
    everything = proven.everything(torch.device("cuda"))
    with records.pretend(everything), _all_is_true(), run.mode():
        model, step = make(run)
        # The first step compiles, the second fills caches.
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
            # The allocator does not count memory that graphs use in their pool.
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
    fields = asdict(cost)
    seconds = fields.pop("seconds")
    return {**fields, "predicted seconds": float(f"{seconds:.4g}")}


def count_apart(run: Run) -> dict:
    """Count in a separate process, on a null GPU.

    Raises:
        RuntimeError: no null GPU is possible here, or the process failed; says why.
    """
    import null_gpu

    environment = null_gpu.environment()
    # Inductor's choices by timings on a null GPU must not reach the cache of a real one.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor"))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "counts.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "step", "--only", run.implementation]
        command += ["--work", run.work, "--batch", str(run.batch), "--here", str(result)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode or not result.exists():
            raise RuntimeError(f"{run.title}: {process.stderr[-2000:]}")
        return json.loads(result.read_text())


def read(path: Path) -> dict[Run, dict]:
    """Runs in a file."""
    return {Run(entry["implementation"], entry["work"], entry["batch"]): entry for entry in _stored(path)}


def _stored(path: Path) -> list[dict]:
    return json.loads(path.read_text())["runs"] if path.exists() else []


def write(path: Path, runs: dict[Run, dict]) -> None:
    """Write the file, with one line per operation and kernel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {"operations", "parts", "kernels"}

    def lines(entry: dict) -> Iterator[str]:
        for name, value in entry.items():
            if name not in lists:
                yield f"  {json.dumps(name)}: {json.dumps(value)}"
                continue
            items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
            inner = [(f"{json.dumps(key)}: " if key else "") + json.dumps(item) for key, item in items]
            begin, end = "{}" if isinstance(value, dict) else "[]"
            yield f"  {json.dumps(name)}: {begin}\n    " + ",\n    ".join(inner) + f"\n  {end}"

    blocks = ["{\n" + ",\n".join(lines(entry)) + "\n}" for entry in runs.values()]
    path.write_text(f'{{"note": {json.dumps(NOTE)},\n"runs": [\n' + ",\n".join(blocks) + "\n]}\n")


COLUMNS = {
    "launches": lambda entry: f"{entry['counted']['launches']:,}",
    "waits": lambda entry: f"{entry['counted']['waits']}",
    "copies to / from / within": lambda entry: " / ".join(
        str(entry["counted"][f"copies {where} the device"]) for where in ("to", "from", "within")
    ),
    "memsets": lambda entry: f"{entry['counted']['memsets']}",
    "peak, GiB": lambda entry: _gibibytes(entry["counted"]["peak bytes"]),
    "moved, GiB": lambda entry: _seen(entry, f"{entry['counted']['bytes moved'] / 2**30:.1f}"),
    "TFLOP": lambda entry: _seen(entry, f"{entry['counted']['FLOPs'] / 1e12:.2f}"),
    "predicted, ms": lambda entry: _seen(entry, f"{1e3 * entry['predicted']['seconds on the device']:.1f}"),
}


def _gibibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**30:.2f}"


def _seen(entry: dict, figure: str) -> str:
    """The figure; – if some operations are unknown, or if recording changes the operations."""
    counted = entry["counted"]
    return "–" if counted["launches of no known operation"] or counted["launches more when watched"] else figure


def show(runs: dict[Run, dict], before: dict[Run, dict], details: bool) -> None:
    """Print tables, with the earlier figures if given."""

    def cell(run: Run, figure: Callable[[dict], str]) -> str:
        now, then = figure(runs[run]), figure(before[run]) if run in before else None
        return now if then in (None, now) else f"{then} → {now}"

    table = Table(title="Counted on a null GPU, time predicted; a graph is one launch, memsets are no launches")
    table.add_column("implementation", min_width=30)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(run.title, *(cell(run, figure) for figure in COLUMNS.values()))
    console.print(table)
    from counts.counting import PARTS

    parts = [part for part in PARTS if any(part in entry["parts"] for entry in runs.values())]
    table = Table(title="By part, forward and backward together: launches, predicted ms")
    table.add_column("implementation", min_width=30)
    for part in parts:
        table.add_column(part, justify="right")
    for run in runs:
        table.add_row(run.title, *(cell(run, partial(_part, part=part)) for part in parts))
    console.print(table)
    for run, entry in runs.items() if details else ():
        _show_details(run, entry)


def _part(entry: dict, part: str) -> str:
    cost = entry["parts"].get(part)
    return "–" if cost is None else _seen(entry, f"{cost['launches']:,}, {1e3 * cost['predicted seconds']:.2f}")


def _show_details(run: Run, entry: dict) -> None:
    table = Table(title=f"{run.title}: operations")
    for name in ("operation", "dtype", "calls", "launches", "waits", "GiB", "GFLOP", "predicted, ms"):
        table.add_column(name, justify="left" if name in ("operation", "dtype") else "right")
    for row in entry["operations"]:
        numbers = (row["bytes"] / 2**30, row["flops"] / 1e9, 1e3 * row["predicted seconds"])
        counts = (str(row[name]) for name in ("calls", "launches", "waits"))
        table.add_row(escape(row["operation"]), row["dtype"], *counts, *(f"{number:.2f}" for number in numbers))
    console.print(table)
    if entry["FLOPs not known"]:
        console.print(
            f"predicted from bytes alone, FLOPs unknown: {', '.join(entry['FLOPs not known'])}", highlight=False
        )
    table = Table("launches", "kernel", title=f"{run.title}: kernels")
    for name, launches in entry["kernels"].items():
        table.add_row(str(launches), escape(name))
    console.print(table)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command("step", __doc__)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 2], help="batch sizes of training; default 8 and 2")
    parser.add_argument("--before", type=Path, help="a file of an earlier run, to compare with")
    parser.add_argument("--details", action="store_true", help="print every operation and kernel too")
    parser.add_argument(
        "--out",
        type=Path,
        default=COUNTS / "step.json",
        help="other runs in this file stay; default %(default)s",
    )
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    return parser


def chosen(options: argparse.Namespace) -> list[Run]:
    """The runs of the options; inference takes one image."""
    runs = [Run(name, work, batch) for work, batch, name in product(options.work, options.batch, options.only)]
    runs = [run if run.work == "training" else Run(run.implementation, run.work, 1) for run in runs]
    return [run for run in dict.fromkeys(runs) if run.implementation in WORK[run.work]]


def main(words: list[str]) -> int:
    """Count all requested runs; the exit status is 1 if one failed."""
    # The null GPU is in tests/, which only the tests have on their path.
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
    counted, failed = {}, 0
    for run in runs:
        with console.status(f"{run.title} …"):
            try:
                counted[run] = count_apart(run)
            except RuntimeError as error:
                console.print(f"failed: {error}", style="red", markup=False)
                failed = 1
        write(options.out, {**read(options.out), **counted})
    show(counted, read(options.before) if options.before else {}, options.details)
    return failed
