"""Make the tables by which `backend="auto"` picks kernels on unchecked GPUs, from the result files.

    python benchmarks/run.py measured [--results DIR] [--tables DIR]

One table per architecture with results, for example `kernels/measured/sm_90.json`. CPUs have none.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean, median

from conddetr.files import write_text
from conddetr.kernels.records import Table, Verdict
from harness.command import command
from harness.refusals import OURS, is_failure
from harness.result import Result
from harness.show import console
from harness.store import RESULTS, read_results

OPERATIONS: dict[str, dict[str, str]] = {
    "add_norm": {"": "add_norm"},
    "attn": {"": "conditional_attention"},
    "bits": {"": "dropout_bits"},
    "boxes": {"": "matched_box_loss"},
    "conv": {"convolution pair": "convolution_pair", "convolution": "convolution"},
    "conv3x3": {"": "convolution_3x3"},
    "cost": {"": "matching_cost"},
    "dropout": {"": "dropout_add"},
    "errors": {"": "prediction_errors"},
    "focal": {"": "focal_loss"},
    "match": {"": "linear_assignment"},
    "pool": {"": "max_pool"},
    "position": {"": "grid_positions"},
    "prediction": {"": "predicted_boxes"},
    "query": {"": "spatial_query"},
    "relu_dropout": {"": "relu_dropout"},
    "sine": {"sine embedding": "sine_embedding", "λ ⊙ p_s": "conditional_spatial_query"},
    "weights": {"": "prepare_weights"},
}
"""Benchmark → beginning of a problem's title → the public function that it times."""
TABLES = Path(__file__).parents[2] / "kernels" / "measured"
"""The package's folder of tables; an installed package has a copy."""
OTHERS = ("torch-linear-assignment", "torchmatch", "FlashAttention-4", "FlexAttention, FLASH")
"""Peers that need more than PyTorch: `auto` never uses one instead of a slower kernel."""
KERNELS = re.compile(rf"{OURS}, (triton|native)(, (dense|separable))?")
"""Names of implementations that the operation itself may pick. A forced one, "not Hopper's kernel", is not matched."""
DTYPES = re.compile(r"\b(b?float16|float32|float64)\b")
CONDITIONS = ("torch", "triton", "driver", "commit")
"""Conditions of a GPU's measurements in a table, besides their dates."""


def verdicts(benchmark: str, result: Result) -> Iterator[Verdict]:
    """Verdicts on our kernels for one problem; kernels that this GPU cannot run have none."""
    operation = next(name for title, name in OPERATIONS[benchmark].items() if result.title.startswith(title))
    # Titles without a dtype: costs, which are float32, and bits, which count as float32.
    dtype = match[0] if (match := DTYPES.search(result.title)) else "float32"
    if dtype == "float64":
        return
    plain = [median(seconds) for name, seconds in result.seconds.items() if is_of_pytorch(name)]
    for name in (*result.seconds, *result.refused):
        kernel, why = KERNELS.fullmatch(name), result.refused.get(name, "")
        if kernel and name in result.seconds:
            speedup = min(plain) / median(result.seconds[name]) if plain else None
            yield Verdict(operation, kernel[1], dtype, "", None, speedup)
        elif kernel and is_failure(name, why):
            yield Verdict(operation, kernel[1], dtype, f"{why} ({result.title}).", None, None)


def is_of_pytorch(name: str) -> bool:
    """Whether a kernel must be faster than this implementation."""
    return name == f"{OURS}, eager" or not name.startswith((OURS, *OTHERS))


def tables(results: Path) -> dict[str, Table]:
    """Architecture → its table, from all GPUs among the results.

    Raises:
        ValueError: results of a GPU lack its compute capability; names the file.
    """
    by_architecture: dict[str, dict[str, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    environments: dict[str, list[dict[str, str]]] = defaultdict(list)
    for path in sorted(results.glob("*/*.json")):
        # After a hyphen come options of the same benchmark.
        benchmark = path.stem.split("-")[0]
        environment = json.loads(path.read_text(encoding="utf-8")).get("environment", {})
        # Without nvidia-smi the driver of a GPU is "unknown"; a CPU has "none".
        if benchmark not in OPERATIONS or environment.get("driver", "none") == "none":
            continue
        capability = environment.get("compute capability", "none")
        if not re.fullmatch(r"\d+\.\d", capability):
            raise ValueError(
                f"{path}: expected the compute capability of {environment['device']} in its environment, e.g. 9.0, "
                f"got {capability!r}: run the benchmark again."
            )
        architecture = f"sm_{capability.replace('.', '')}"
        environments[environment["device"]].append(environment)
        for result in read_results(path):
            by_architecture[architecture][environment["device"]] += verdicts(benchmark, result)
    return {
        architecture: Table(
            architecture, {gpu: conditions(environments[gpu]) for gpu in by_gpu}, tuple(worst_of(dict(by_gpu)))
        )
        for architecture, by_gpu in sorted(by_architecture.items())
    }


def conditions(environments: list[dict[str, str]]) -> str:
    """Versions and dates of measurements, in one line."""
    parts = [f"{key} {' and '.join(sorted({environment[key] for environment in environments}))}" for key in CONDITIONS]
    days = [environment["date"].partition("T")[0] for environment in environments]
    return f"{', '.join(parts)}, {' to '.join(sorted({min(days), max(days)}))}"


def combined(verdicts: list[Verdict], where: str) -> Verdict:
    """One verdict from those of several problems: the largest error and the geometric mean of the speed-ups.

    Problems that were not timed do not count in the mean. The verdict has the first problem's reason to refuse; without
    any, it refuses if the mean is below 1.

    Args:
        verdicts: of one operation, backend and dtype; at least one.
        where: ends the reason "slower than PyTorch".
    """
    errors = [verdict.error for verdict in verdicts]
    speedups = [verdict.speedup for verdict in verdicts if verdict.speedup is not None]
    # To four digits: the last ones depend on the Python version.
    speedup = float(f"{geometric_mean(speedups):.4g}") if speedups else None
    refused = next((verdict.refused for verdict in verdicts if verdict.refused), "")
    if not refused and speedup is not None and speedup < 1:
        refused = f"it is slower than PyTorch {where}: {speedup:.2f}× its speed."
    return replace(verdicts[0], refused=refused, error=None if None in errors else max(errors), speedup=speedup)


def worst_of(verdicts_by_gpu: dict[str, list[Verdict]]) -> Iterator[Verdict]:
    """One verdict for each operation, backend and dtype: of the GPU that refuses it, or gains least from it."""
    combined_by_key: dict[tuple[str, str, str], list[Verdict]] = defaultdict(list)
    for gpu, all_verdicts in verdicts_by_gpu.items():
        same: dict[tuple[str, str, str], list[Verdict]] = defaultdict(list)
        for verdict in all_verdicts:
            same[verdict.operation, verdict.backend, verdict.dtype].append(verdict)
        for key, group in same.items():
            combined_by_key[key].append(combined(group, f"on {gpu}"))
    for _, group in sorted(combined_by_key.items()):
        yield min(group, key=lambda verdict: (not verdict.refused, verdict.speedup or math.inf))


def main(words: list[str]) -> None:
    """Write a table for each architecture, and remove tables without results."""
    parser = command("measured", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of one folder per device")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder that the package reads")
    options = parser.parse_args(words)
    files = {options.tables / f"{architecture}.json": table for architecture, table in tables(options.results).items()}
    for path in set(options.tables.glob("sm_*.json")) - files.keys():
        path.unlink()
    for path, table in files.items():
        write_text(path, table.to_json())
    paths = ", ".join(map(str, files)) or "no table: there are no results of GPUs"
    console.print(f"wrote {paths}", highlight=False, soft_wrap=True)
