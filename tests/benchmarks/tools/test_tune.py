"""The search over launch settings, with a fake clock and real kernels."""

import math
import time

import pytest
import torch
import triton

from conddetr.kernels.attn import triton as kernels
from ops import attn
from tools import tune

SHIPPED = kernels.launch_settings(90, "half", 32)


def test_every_setting_computes_the_same_result(monkeypatch):
    monkeypatch.setitem(attn.GRIDS, "small", (2, 3))
    problem = attn.Problem("small", 1, torch.float32, 0.1, True, False, queries=5)
    tiles = [kernels.Tiles(16, 16, 4, 1), kernels.Tiles(32, 16, 4, 2)]
    results = []

    def clock(run):
        results.append(run())
        return float(len(results))

    for kernel in tune.KERNELS:
        results.clear()
        seconds_by_setting = tune.search(kernel, [tune.call(problem, kernel)], tiles, SHIPPED, clock, math.inf)
        assert list(seconds_by_setting) == [getattr(SHIPPED, kernel), *tiles]
        assert [seconds for [seconds] in seconds_by_setting.values()] == [1.0, 2.0, 3.0]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)
        tune.report(kernel, seconds_by_setting)


def test_search_leaves_out_settings_that_do_not_fit_and_stops_in_time():
    def clock(run):
        run()
        return 1.0

    def run(launch):
        if launch.forward.queries == 128:
            raise triton.runtime.errors.OutOfResources(300, 200, "shared memory")

    tiles = [kernels.Tiles(128, 64, 4, 2), kernels.Tiles(32, 64, 4, 2)]
    seconds_by_setting = tune.search("forward", [run], tiles, SHIPPED, clock, math.inf)
    assert list(seconds_by_setting) == [SHIPPED.forward, tiles[1]]
    assert list(tune.search("forward", [run], tiles, SHIPPED, clock, time.monotonic())) == [SHIPPED.forward]


def test_shipped_settings_must_run():
    def clock(run):
        raise triton.runtime.errors.OutOfResources(300, 200, "shared memory")

    with pytest.raises(RuntimeError, match=r"forward: OutOfResources: .*shared memory.*, with the shipped settings"):
        tune.search("forward", [lambda launch: None], [], SHIPPED, clock, math.inf)
