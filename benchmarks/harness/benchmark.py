"""Run the problems of a benchmark: check, time, print, write."""

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
    """Parse the flags of a benchmark and return the function that runs it.

    Args:
        name: of the benchmark and of its file.
        module: its `Problem` defines what is timed.
        words: of the command line.

    Raises:
        SystemExit: a flag is wrong, or the benchmark does not run on this machine.
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
    """Options of all benchmarks."""
    parser = command(name, documentation)
    parser.add_argument("--rounds", type=int, default=50 if DEVICE.type == "cuda" else 10, help="timed calls of each")
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help=f"no problem starts after this time, the most important come first; default {seconds:.0f}",
    )
    parser.add_argument("--cudagraph", action="store_true", help="time replays of CUDA graphs: no launch overhead")
    return parser


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse the options; an option that this machine does not support is an error."""
    options = parser.parse_args(words)
    if options.cudagraph and DEVICE.type != "cuda":
        parser.error("--cudagraph needs an NVIDIA GPU")
    return options


def run_all(name: str, runs: dict[str, Callable[[], Result]], options: argparse.Namespace) -> None:
    """Time the problems one after the other; after each, print it and rewrite the result file.

    Args:
        name: of the benchmark and, with the suffixes of `--cudagraph` and `--compiled`, of its file.
        runs: title → function that returns its result; the most important first.
        options: of the command line; after `seconds` no problem starts.

    Raises:
        SystemExit: one of our implementations is wrong or failed, or a whole problem failed. Raised after everything
            else is measured and written.
    """
    name += "-cudagraph" * options.cudagraph + "-compiled" * getattr(options, "compiled", False)
    results, titles, started = [], list(runs), time.monotonic()
    settings = {key: str(value) for key, value in vars(options).items()}
    with without_tf32():
        while titles and (not results or time.monotonic() - started < options.seconds):
            title = titles.pop(0)
            results.append(result_of(title, runs[title]))
            print_table(results[-1])
            path = write_results(name, settings, results, left_out=titles)
    if titles:
        console.print(f"{len(titles)} problems left out after {options.seconds:.0f} s: --seconds allows more time.")
    say_written(path, "; `python benchmarks/run.py report` plots it")
    if faults := failures(results):
        raise SystemExit("\n".join(faults))


def result_of(title: str, run: Callable[[], Result]) -> Result:
    """Result of one problem; if the problem itself fails, a result without times that gives the reason."""
    refused: dict[str, str] = {}
    with refusing(PROBLEM, refused):
        return run()
    return Result(title, {}, refused=refused)


def failures(results: list[Result]) -> list[str]:
    """One line per implementation of ours that is wrong or failed, and per problem that failed as a whole."""
    return [
        f"{result.title}: {name}: {why}"
        for result in results
        for name, why in result.refused.items()
        if is_failure(name, why)
    ]
