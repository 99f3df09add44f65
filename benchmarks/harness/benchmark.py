"""Problems one after the other: checked, timed, printed and written."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType

from harness.command import command
from harness.machine import DEVICE, without_tf32
from harness.refusals import PROBLEM, RefusedError, is_failure, refusing
from harness.result import Result
from harness.show import console, print_table
from harness.store import say_written, write_results


def prepare(name: str, module: ModuleType, words: list[str]) -> Callable[[], None]:
    """Read the flags of a benchmark; the answer runs it.

    Args:
        name: of the benchmark and of its file.
        module: its `Problem` says what is timed.
        words: of the command line.

    Raises:
        SystemExit: a flag is wrong, or this machine times nothing of it.
    """
    parser = arguments(name, module.__doc__, module.Problem.seconds)
    module.Problem.arguments(parser)
    options = parse(parser, words)
    if module.Problem.why_not is not None:
        parser.error(module.Problem.why_not)
    try:
        problems = module.Problem.asked_for(options)
    except RefusedError as error:
        parser.error(str(error))
    return partial(run_all, name, {problem.title: partial(problem.measured, options) for problem in problems}, options)


def arguments(name: str, documentation: str, seconds: float) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = command(name, documentation)
    parser.add_argument("--rounds", type=int, default=50 if DEVICE.type == "cuda" else 10, help="timed calls of each")
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help=f"no new problem is begun after this while, the most important come first; default {seconds:.0f}",
    )
    parser.add_argument("--cudagraph", action="store_true", help="time replays of CUDA graphs: no launch overhead")
    return parser


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The options given; an error for one that this machine does not have."""
    options = parser.parse_args(words)
    if options.cudagraph and DEVICE.type != "cuda":
        parser.error("--cudagraph needs an NVIDIA GPU")
    return options


def run_all(name: str, runs: dict[str, Callable[[], Result]], options: argparse.Namespace) -> None:
    """Time problem after problem, print each, and keep the result file complete after each.

    Args:
        name: of the benchmark and, with the suffix of `--cudagraph`, of its file.
        runs: title → what gives its result; the most important first.
        options: of the command line; `seconds` is the time after which no problem is begun.

    Raises:
        SystemExit: one of ours is wrong or failed, or a whole problem; said when all else is measured and written.
    """
    name += "-cudagraph" * options.cudagraph
    results, titles, started = [], list(runs), time.monotonic()
    settings = {key: str(value) for key, value in vars(options).items()}
    with without_tf32():
        while titles and (not results or time.monotonic() - started < options.seconds):
            title = titles.pop(0)
            results.append(result_of(title, runs[title]))
            print_table(results[-1])
            path = write_results(name, settings, results, left_out=titles)
    if titles:
        console.print(f"{len(titles)} problems left out after {options.seconds:.0f} s: --seconds gives more.")
    say_written(path, "; `python benchmarks/run.py report` draws it")
    if found := failures(results):
        raise SystemExit("\n".join(found))


def result_of(title: str, run: Callable[[], Result]) -> Result:
    """The result of one problem; where the problem itself fails, one without times that says why."""
    refused: dict[str, str] = {}
    with refusing(PROBLEM, refused):
        return run()
    return Result(title, {}, refused=refused)


def failures(results: list[Result]) -> list[str]:
    """One line for each of ours that is wrong or failed, and for each problem that failed as a whole."""
    return [
        f"{result.title}: {name}: {why}"
        for result in results
        for name, why in result.refused.items()
        if is_failure(name, why)
    ]
