"""Compiles the kernels of a check on a GPU in several processes beforehand; Triton caches them on disk.

Each process launches its share of the problems once. Run as a program, this module is one such process.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from conddetr.kernels.check.attempt import attempt
from conddetr.kernels.check.cases import IMAGES, problems
from conddetr.kernels.check.inputs import Maker
from conddetr.kernels.check.isolation import isolated, products
from conddetr.kernels.check.problem import Problem, evaluate, upstream_of
from conddetr.kernels.registry import HAS_TRITON, BackendError

PROCESSES = 4
"""Maximum number: each has a context of a few hundred MiB on the GPU."""


def compile_kernels(
    device: torch.device,
    short: bool,
    dtypes: Sequence[torch.dtype],
    tell: Callable[[str, int, int], None],
    tune: bool = False,
) -> float:
    """Compile Triton's kernels in several processes; the check compiles those that fail here.

    Args:
        device: a GPU.
        short: only the sizes of the model.
        dtypes: the dtypes that will be checked.
        tell: takes the name of the current step, the number of finished steps and their total.
        tune: also compile with each of the launch settings that will be tried.

    Returns:
        Duration in seconds.
    """
    if not HAS_TRITON:
        return 0.0
    begin = time.perf_counter()
    total, done = len(_tasks(device, short, dtypes, tune)), 0
    count = max(1, min(PROCESSES, _cores()))
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    command = [sys.executable, "-m", "conddetr.kernels.check.compiling", str(device), *names]
    command += ["--short"] * short + ["--tune"] * tune
    reader, writer = os.pipe()
    started: list[subprocess.Popen] = []
    try:
        # The package may lie on a path that only this process has.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # If no process can be started, the check itself compiles everything.
        with contextlib.suppress(OSError):
            for share in range(count):
                options = ["--share", str(share), "--of", str(count)]
                streams = {"stdin": subprocess.DEVNULL, "stdout": writer, "stderr": subprocess.DEVNULL}
                started.append(subprocess.Popen([*command, *options], env=environment, **streams))
        os.close(writer)
        writer = -1
        with os.fdopen(reader) as lines:
            reader = -1
            for line in lines:
                done += 1
                tell(f"compiling {line.strip()}", done, total)
    finally:
        for process in started:
            process.terminate()
            process.wait()
        for end in (reader, writer):
            if end >= 0:
                os.close(end)
    return time.perf_counter() - begin


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(
    device: torch.device, short: bool, dtypes: Sequence[torch.dtype], tune: bool
) -> list[tuple[str, Callable[[], None]]]:
    """The tasks of all processes: the line that is printed afterwards, and the call."""
    wanted = [problem for problem in problems(IMAGES["cuda"]) if problem.is_model or not short]
    tasks: list[tuple[str, Callable[[], None]]] = [
        (problem.operation, partial(_launch, problem, dtype, device))
        for problem in wanted
        for dtype in dtypes
        if dtype in problem.dtypes
    ]
    if tune:
        # Without tuning, Triton need not be installed.
        from conddetr.kernels.check import tuning

        for subject in tuning.subjects(device, dtypes):
            tasks += [
                (f"{kernel} of attention", partial(tuning.launch_all, subject, kernel, device))
                for kernel in tuning.KERNELS
            ]
    return tasks


def _launch(problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
    """Run forward and backward once; the check reports errors later."""
    inputs = problem.make(Maker(device, dtype))

    def launch() -> None:
        upstream = upstream_of(problem.run(inputs, "triton"))
        evaluate(lambda tensors: problem.run(tensors, "triton"), inputs, problem.gradients, upstream)

    try:
        with products("tf32" if problem.is_tf32 else "ieee"):
            attempt(launch)
    except BackendError:
        return


def main() -> None:
    """One process: prints a line for every finished problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device")
    parser.add_argument("dtypes", nargs="+")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    options = parser.parse_args()
    dtypes = [getattr(torch, name) for name in options.dtypes]
    device = torch.device(options.device)
    with isolated(device):
        for name, task in _tasks(device, options.short, dtypes, options.tune)[options.share :: options.of]:
            task()
            # Several processes share the GPU.
            torch.cuda.empty_cache()
            print(name, flush=True)


if __name__ == "__main__":
    main()
