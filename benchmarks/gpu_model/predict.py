"""Predicted times of the attention kernels on an H100, from their machine code, without a GPU.

    python benchmarks/run.py predict                                        # all kernels and problems, some minutes
    python benchmarks/run.py predict --before benchmarks/predictions/before.json
    python benchmarks/run.py predict --kernel backward_key_kernel --tiles 64,64,4,3 32,64,4,2  # one with other settings
    python benchmarks/run.py predict --peers            # PyTorch's kernels too, from its library: 1 GB of disk
    python benchmarks/run.py predict --candidates       # writes the package's candidates of `conddetr check --tune`

The instructions of a kernel's main loop determine its clocks on each unit; a model of a quarter of one of Hopper's
multiprocessors (benchmarks/gpu_model) gives the clocks of one trip. For whole problems the launches of the
implementations are recorded on a null GPU (tests/null_gpu). Nothing here is measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conddetr.kernels.attn.triton import Tiles
from conddetr.kernels.attn.triton.launch import write_tiles
from gpu_model import figures, kernels, ranking, remarks, stored, triton_code
from gpu_model.figures import Figures
from gpu_model.hot_path import HotPathError
from gpu_model.stored import Prediction, Predictions, Row
from harness.command import command
from harness.machine import commit
from tools import aot_cuda

ROOT = Path(__file__).parents[2]

PEERS = "torch of the peers"
"""Key of the PyTorch version whose machine code the peers are."""
console = Console(width=max(235, Console().width))
"""Wide enough for every column: on a narrower terminal lines wrap."""


def versions() -> dict[str, str]:
    """Versions of the compilers, and of PyTorch, whose operators whole problems call."""
    nvcc = aot_cuda.nvcc_version().split("release ")[-1].split(",")[0] if aot_cuda.find_nvcc() else "none"
    return {"triton": metadata.version("triton"), "nvcc": nvcc, "torch": metadata.version("torch")}


def why_no_problems() -> str | None:
    """Why whole problems cannot be predicted here, or None."""
    import null_gpu

    return null_gpu.why_not()


def find(architectures: list[int], main: bool, before: Predictions) -> tuple[Row, ...]:
    """Figures of the kernels of some architectures; those of other architectures stay."""
    rows = []
    for architecture in architectures:
        with console.status(f"sm_{architecture} …"):
            rows += kernels.rows(architecture, main)
    keys = {row.key for row in rows}
    kept = [row for row in before.kernels if row.key not in keys]
    if not main:
        # Kernels that no longer exist are dropped.
        kept = [row for row in kept if row.figures.architecture not in architectures]
    return tuple(sorted((*rows, *kept), key=lambda row: (row.figures.architecture != figures.TIMED, row.key[3])))


def find_peers() -> tuple[Figures, ...]:
    """Figures of PyTorch's kernels, from its library."""
    from gpu_model import peer_code

    with console.status("PyTorch's kernels …"):
        return tuple(figures.of(kernel) for kernel in peer_code.kernels())


def find_problems(path: Path) -> tuple[Prediction, ...]:
    """Predictions of all problems, in a process with a null GPU.

    Args:
        path: a file with the figures of the peers.

    Raises:
        RuntimeError: no null GPU is possible here, or the process failed; says why.
    """
    import null_gpu

    with tempfile.TemporaryDirectory() as folder, console.status("whole problems, on a null GPU …"):
        result = Path(folder) / "problems.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "predict"]
        command += ["--out", str(path), "--here", str(result)]
        run = subprocess.run(command, env=null_gpu.environment(), capture_output=True, text=True)
        if run.returncode or not result.exists():
            raise RuntimeError(f"whole problems: {run.stderr[-2000:]}")
        return stored.read(result).problems


def problems_here(path: Path, result: Path) -> None:
    """Predict all problems in this process, and write them to `result`."""
    from gpu_model import problems

    peers = stored.read(path).peers
    predictions = [
        problems.predict(problem, name, peers) for problem in problems.problems() for name in problems.IMPLEMENTATIONS
    ]
    stored.write(result, Predictions(problems=tuple(predictions)))


def show_kernels(current: Predictions, before: Predictions) -> None:
    """Print a table with a row per kernel, and the remarks."""
    table = Table(title="Kernels: instructions, and predicted clocks of a quarter of a multiprocessor, for 1024 scores")
    left_aligned = ("", "kernel", "variant", "settings", "binding")
    for name in ("", "kernel", "variant", "settings", "sm", "registers", "KiB", "blocks", "instructions", "binding",
                 "one block", "all blocks", "× floor"):  # fmt: skip
        table.add_column(name, justify="left" if name in left_aligned else "right", no_wrap=True)
    old = before.figures()
    longer = remarks.longer(current.figures(), old)
    remarks_by_key = {}
    for row in (*current.kernels, *(Row("PyTorch", peer.form, peer) for peer in current.peers)):
        slower = [f"{longer[row.key]:.2f}× as long as before"] if row.key in longer else []
        remarks_by_key[row.key] = "; ".join((*remarks.of(row.figures), *slower))
        form = "" if row.implementation == "PyTorch" else row.figures.form
        cells = _cells(row.figures, old.get(row.key))
        table.add_row(row.implementation, row.figures.name, row.variant, form, *cells)
    console.print(table)
    for (implementation, name, variant, architecture), text in remarks_by_key.items():
        if text:
            row = f"{implementation}, {name}{', ' if variant else ''}{variant}, sm_{architecture}"
            console.print(f"- {row}: {text}", highlight=False, markup=False, soft_wrap=True)


def _cells(current: Figures, before: Figures | None) -> list[str]:
    def cell(value: float | None, old: float | None, digits: int = 0) -> str:
        now = "–" if value is None else f"{value:,.{digits}f}"
        then = now if old is None else f"{old:,.{digits}f}"
        return now if now == then else f"{then} → {now}"

    def number(name: str, digits: int = 0) -> str:
        return cell(getattr(current, name), getattr(before, name, None), digits)

    binding = f"{current.binding} {current.needs[current.binding]:.0f}"
    return [str(current.architecture), number("registers"), f"{current.shared / 1024:.1f}", number("blocks"),
            number("instructions"), binding, number("alone"), number("full"), number("ratio", 2)]  # fmt: skip


def show_problems(current: Predictions, before: Predictions) -> None:
    """Print a table with a row per problem, with the ratios to the floor and to the peer."""
    table = Table(title="Whole problems, predicted µs (× floor, speed-up over PyTorch)")
    names = list(dict.fromkeys(prediction.implementation for prediction in current.problems))
    table.add_column("problem")
    for name in ("floor", *names):
        table.add_column(name, justify="right")
    by_key = {prediction.key: prediction for prediction in current.problems}
    old = {prediction.key: prediction for prediction in before.problems}
    for problem in dict.fromkeys(prediction.problem for prediction in current.problems):
        ours = [by_key[*problem, name] for name in names]
        cells = [_problem_cell(prediction, old.get(prediction.key), ours[-1]) for prediction in ours]
        table.add_row(_title(problem), f"{1e6 * ours[0].floor:.1f}", *cells)
    console.print(table)


def _title(problem: tuple[bool, bool, str, int]) -> str:
    backward, padded, grid, batch = problem
    passes = "forward + backward, dropout 0.1" if backward else "forward"
    return f"{passes}, {grid}, B = {batch}{', mixed aspect ratios' if padded else ''}"


def _problem_cell(prediction: Prediction, before: Prediction | None, peer: Prediction) -> str:
    now, then = f"{1e6 * prediction.seconds:,.0f}", f"{1e6 * before.seconds:,.0f}" if before else None
    faster = "" if prediction is peer else f", {peer.seconds / prediction.seconds:.2f}×"
    return f"{now if then in (None, now) else f'{then} → {now}'} ({prediction.seconds / prediction.floor:.1f}{faster})"


def explore(options: argparse.Namespace) -> None:
    """Print figures of one of Triton's kernels with each of some settings."""
    rows = []
    for setting in options.tiles or [None]:
        variant = (options.width, not options.dense, options.dtype, not options.no_dropout)
        job = triton_code.job(options.kernel, options.architectures[0], *variant)
        job = triton_code.changed(job, setting, options=dict(options.set))
        try:
            kernel = triton_code.compiled(job, options.architectures[0])
            row_figures = figures.of(kernel)
        except HotPathError as error:
            console.print(f"{setting}: {error}", style="red", markup=False)
            continue
        rows.append(Row("triton", "", row_figures))
        for label, numbers in (
            ("instructions", row_figures.by_name),
            ("clocks of", row_figures.needs),
            ("by blocks", row_figures.clocks),
        ):
            text = ", ".join(f"{name} {number:.0f}" for name, number in numbers.items())
            console.print(f"{row_figures.form}: {label} {text}", soft_wrap=True, highlight=False)
        for instruction in kernel.path.main if options.listing else ():
            words = (f"{instruction.address:05x}", instruction.predicate, instruction.operation, instruction.operands)
            console.print(escape(" ".join(words)), highlight=False)
    show_kernels(Predictions(kernels=tuple(rows)), Predictions())


def rank_candidates() -> None:
    """Rank launch settings, write the package's table, and print the settings with their predicted clocks."""
    with console.status("launch settings of every variant …"):
        ranked = ranking.rank_all()
    ranking.write(ranked)
    table = Table(title="Candidates: predicted clocks for 1024 scores; except for Hopper only their order counts")
    for name, justify in (("list", "left"), ("settings", "left"), ("clocks", "right")):
        table.add_column(name, justify=justify, no_wrap=True)
    for key, candidates in ranked.items():
        for setting, clocks in candidates:
            text = ", ".join(f"{name} {value}" for name, value in write_tiles(setting).items())
            table.add_row(key, text, f"{clocks:,.0f}")
    console.print(table)


def tiles(text: str) -> Tiles:
    """Parse `64,64,4,3` or `64,64,4,3,128,ahead`: queries, keys, warps, stages, most registers, scores a tile ahead."""
    numbers = text.removesuffix(",ahead").split(",")
    return Tiles(*map(int, numbers), ahead=text.endswith(",ahead"))


def constant(text: str) -> tuple[str, object]:
    """Parse `NAME=3`, `NAME=True` or `NAME=word`."""
    name, value = text.split("=")
    try:
        return name, json.loads(value.lower())
    except json.JSONDecodeError:
        return name, value


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command("predict", __doc__)
    parser.add_argument(
        "--architectures",
        nargs="+",
        type=int,
        choices=kernels.ARCHITECTURES,
        default=kernels.ARCHITECTURES,
        metavar="SM",
        help="default: all; only 90 has predicted clocks",
    )
    parser.add_argument("--main", action="store_true", help="only the kernels of training, with all blocks")
    parser.add_argument("--no-problems", action="store_true", help="only kernels")
    parser.add_argument(
        "--peers", action="store_true", help="recompute PyTorch's kernels instead of reading them from the file"
    )
    parser.add_argument(
        "--candidates", action="store_true", help="only rank launch settings, and write the package's table"
    )
    parser.add_argument("--before", type=Path, help="a file of an earlier run, to compare with")
    parser.add_argument("--out", type=Path, default=stored.FOLDER / "predictions.json", help="default %(default)s")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    one = parser.add_argument_group("one kernel of kernels/attn/triton; nothing is written")
    one.add_argument("--kernel")
    one.add_argument(
        "--tiles",
        nargs="+",
        type=tiles,
        help="queries,keys,warps,stages[,registers][,ahead]; default: the shipped settings",
    )
    one.add_argument("--no-dropout", action="store_true")
    one.add_argument("--dense", action="store_true", help="dense spatial keys and a mask")
    one.add_argument("--width", type=int, default=32, choices=kernels.WIDTHS, help="of heads; default 32")
    one.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="fp32: with TF32")
    one.add_argument("--set", nargs="+", type=constant, default=[], metavar="NAME=VALUE", help="compile-time arguments")
    one.add_argument("--listing", action="store_true", help="print the instructions of one trip")
    return parser  # fmt: skip


def main(words: list[str]) -> int:
    """Predict, write the file, and print tables."""
    # The null GPU is in tests/, which only the tests have on their path.
    sys.path.append(str(ROOT / "tests"))
    parser = arguments()
    options = parser.parse_args(words)
    if options.here:
        problems_here(options.out, options.here)
        return 0
    if options.kernel:
        explore(options)
        return 0
    if options.candidates:
        rank_candidates()
        return 0
    if options.before and not options.before.exists():
        parser.error(f"--before: there is no {options.before}")
    if aot_cuda.find_nvcc() is None:
        parser.error("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    reason = None if options.no_problems else why_no_problems()
    if reason is not None:
        parser.error(f"{reason}; --no-problems leaves out whole problems")
    committed = stored.read(options.out)
    predictions = replace(
        committed,
        commit=commit(),
        versions={**committed.versions, **versions()},
        kernels=find(options.architectures, options.main, committed),
    )
    if options.peers or not committed.peers:
        peer_version = {PEERS: metadata.version("torch")}
        predictions = replace(predictions, peers=find_peers(), versions={**predictions.versions, **peer_version})
    stored.write(options.out, predictions)
    if not options.no_problems:
        predictions = replace(predictions, problems=find_problems(options.out))
        stored.write(options.out, predictions)
    before = stored.read(options.before) if options.before else committed
    show_kernels(predictions, before)
    show_problems(predictions, before)
    if before.versions != predictions.versions and before.versions:
        console.print(f"before: {before.versions}; now: {predictions.versions}", highlight=False)
    return 0
