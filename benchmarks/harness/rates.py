"""The clock of this machine, and its rates of copies, products and exponentials."""

import math
import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch

from conddetr.kernels import native
from harness.machine import DEVICE, Run, gpu_state, is_null_gpu

Clock = Callable[[Run], float]


def clock() -> Clock:
    """Returns a function that calls an implementation once and returns the seconds that it took."""
    return _device_clock() if DEVICE.type == "cuda" else _host_clock


def _host_clock(run: Run) -> float:
    """One call on a CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _device_clock() -> Clock:
    """One call on a GPU, timed by device events, after the L2 cache is overwritten.

    The GPU is idle when a call begins: work left from the previous call would hide the launches of this one.
    """
    size = 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    filler = torch.empty(max(size, 1 << 28), dtype=torch.int8, device=DEVICE)
    torch.cuda.synchronize()

    def timed(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        filler.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)

    return timed


@cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a plain copy of 512 MiB on this device; the median of ten."""
    source = torch.ones(1 << 27, device=DEVICE)
    target = torch.empty_like(source)
    return _rate(2 * source.nbytes, lambda: target.copy_(source))


@cache
def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this device, 8192 wide on a GPU and 2048 on a CPU; the median of ten.

    In float32 on a CPU with built native kernels, the rate of multiply-adds in registers instead. Libraries differ in
    how close they come to it.
    """
    if DEVICE.type == "cpu" and dtype == torch.float32 and native.NOT_LOADED is None:
        return native.peak_flops()
    width = 8192 if DEVICE.type == "cuda" else 2048
    matrix = torch.randn(width, width, device=DEVICE).to(dtype)
    out = torch.empty_like(matrix)
    return _rate(2 * width**3, lambda: torch.mm(matrix, matrix, out=out))


def _rate(amount: float, run: Run) -> float:
    """Amount per second; infinite on a null GPU, where nothing takes any time."""
    timed = clock()
    samples = [timed(run) for _ in range(12)][2:]
    return math.inf if is_null_gpu() else amount / median(samples)


@cache
def exponential_rate() -> float | None:
    """`ex2` per second at the highest clock: 16 per clock and multiprocessor (CUDA programming guide).

    None on a CPU, and if the driver does not report the clock.
    """
    megahertz = gpu_state()["max SM clock"].removesuffix(" MHz")
    if not megahertz.isdigit():
        return None
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count * 16 * 1e6 * int(megahertz)
