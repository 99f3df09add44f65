"""Counts of a step's operations, and ours compared with the committed counts."""

import re

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

from counts.counting import BANDWIDTH, LAUNCH, RATES, Watch, short_name
from counts.step import COUNTS, IMPLEMENTATIONS, Run, count, make, read, write
from null_gpu.counts import counted

COMMITTED = read(COUNTS / "step.json")
QUICK = (("training", 8), ("inference-bfloat16", 1))


def our_runs() -> list:
    """The runs of our model in the file. Runs through Inductor take minutes."""
    runs = [run for run in COMMITTED if run.implementation == "ours"]
    slow = [run for run in runs if (run.work, run.batch) not in QUICK]
    return [pytest.param(run, marks=[pytest.mark.slow] * (run in slow), id=run.title) for run in runs]


def above(actual: dict, committed: dict) -> dict[str, tuple]:
    """Numbers that are larger than the committed ones, each with the committed one.

    The allocator's choice among several free blocks depends on addresses, and changes the peak by a small amount.
    """
    numbers, limits = ({**run["counted"], **run["predicted"]} for run in (actual, committed))
    spread = {"peak bytes": 2 << 20, "seconds on the device": 1e-9}
    return {name: (n, limits[name]) for name, n in numbers.items() if n > limits[name] + spread.get(name, 0)}


@pytest.mark.parametrize("run", our_runs())
def test_our_counts_do_not_exceed_the_committed_ones(run, monkeypatch):
    """After a change that saves something, rewrite the file: python benchmarks/run.py step --only ours."""
    # PyTorch's default: cuDNN's fused convolutions have no deterministic algorithms.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    committed = COMMITTED[run]
    actual = count(run)
    more = above(actual, committed)
    versions = [
        {name: versions[name] for name in ("torch", "triton")}
        for versions in (actual["versions"], committed["versions"])
    ]
    if versions[0] != versions[1]:
        pytest.skip(
            f"{actual['counted']} with {versions[0]}; the committed numbers are of {versions[1]}; above them: {more}"
        )
    assert not more
    assert set(actual["FLOPs not known"]) <= set(committed["FLOPs not known"])


def test_number_above_the_file_is_detected():
    committed = COMMITTED[Run("ours", "training", 8)]
    assert above(committed, committed) == {}
    for kind in ("counted", "predicted"):
        for name, value in committed[kind].items():
            larger = value + 1e-8 if kind == "predicted" else value + 1 + (2 << 20)
            more = {**committed, kind: {**committed[kind], name: larger}}
            assert above(more, committed) == {name: (larger, value)}


def test_file_may_be_in_any_folder(tmp_path):
    path = tmp_path / "some" / "where.json"
    write(path, COMMITTED)
    assert read(path) == COMMITTED


def test_all_implementations_of_the_file_exist():
    assert {run.implementation for run in COMMITTED} <= set(IMPLEMENTATIONS)


class Small(nn.Module):
    """Parts with the names of a model's parts."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, padding=1)
        self.encoder = nn.Linear(8, 16)
        self.decoder = nn.Linear(16, 16)
        self.class_embed = nn.Linear(16, 4)

    def forward(self, x):
        tokens = self.encoder(self.backbone(x).flatten(2).transpose(1, 2))
        return self.class_embed(self.decoder(tokens).exp())


def watched(model, step):
    step()
    with Watch(model) as watch:
        step()
    return watch


def test_backward_counts_for_the_part_of_its_forward():
    model, x = Small().cuda(), torch.zeros(2, 3, 8, 8, device="cuda")
    forward = watched(model, lambda: model(x)).by_part
    both = watched(model, lambda: model(x).sum().backward()).by_part
    # Backward of a linear layer is two products, and of this convolution one, because the image needs no gradient.
    assert both["backbone"].flops == 2 * forward["backbone"].flops
    for part in ("encoder", "decoder", "heads and loss"):
        assert both[part].flops == 3 * forward[part].flops > 0
    # exp, its gradient, the sum, and the first gradient.
    assert 0 < both["other"].launches <= 5
    assert both["other"].flops == 0


def cost(operation):
    """An operation's name, its cost, and its kernels of unknown FLOPs."""
    watch = watched(nn.Module(), operation)
    [(name, _)] = watch.by_operation
    assert list(watch.by_part) == ["other"]
    return name, watch.by_part["other"], watch.without_formula


def test_each_byte_is_read_and_written_once():
    x, row = torch.zeros(256, 1024, device="cuda"), torch.zeros(1024, device="cuda")
    assert cost(lambda: x + row)[1].bytes == 2 * x.nbytes + row.nbytes
    assert cost(lambda: x + row.expand_as(x))[1].bytes == 2 * x.nbytes + row.nbytes
    assert cost(lambda: x.relu_())[1].bytes == 2 * x.nbytes
    assert cost(lambda: x.zero_())[1].bytes == x.nbytes


def test_flops_of_products_follow_their_definition():
    x, weight, bias = (
        torch.zeros(s, device="cuda", dtype=torch.bfloat16) for s in ((2, 8, 32, 32), (8, 8, 3, 3), (8,))
    )
    one = (1, 1)
    flops = 2 * 9 * 8 * x.numel()
    name, total, unknown = cost(lambda: torch.cudnn_convolution_relu(x, weight, bias, one, one, one, 1))
    assert (name, total.flops, total.launches, unknown) == ("cudnn_convolution_relu", flops, 1, set())
    assert cost(lambda: torch.cudnn_convolution_add_relu(x, weight, x, 1.0, bias, one, one, one, 1))[1].flops == flops
    assert cost(lambda: torch.conv2d(x, weight, None, padding=1))[1].flops == flops
    left = torch.zeros(512, 512, device="cuda")
    assert cost(lambda: left @ left)[1].flops == 2 * 512**3


def test_time_is_the_largest_of_launch_bytes_and_flops():
    small, large = torch.zeros(8, device="cuda"), torch.zeros(1 << 26, device="cuda")
    assert cost(lambda: small + 1)[1].seconds == LAUNCH
    assert cost(lambda: large + 1)[1].seconds == pytest.approx(2 * large.nbytes / BANDWIDTH)
    square = torch.zeros(4096, 4096, device="cuda")
    assert cost(lambda: square @ square)[1].seconds == pytest.approx(2 * 4096**3 / RATES["float32"])


@triton.jit
def twice_kernel(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, 2 * tl.load(x + at))


def test_kernel_without_an_operator_is_counted_by_name():
    x, large = torch.zeros(1024, device="cuda"), torch.zeros(1 << 21, device="cuda")
    name, total, unknown = cost(lambda: twice_kernel[(1,)](x, x[512:], 512))
    assert (name, total.launches, total.bytes) == ("twice_kernel", 1, x.nbytes + x.nbytes // 2)
    assert unknown == set()
    assert cost(lambda: twice_kernel[(1,)](large, large, 512))[2] == {"twice_kernel"}


def test_views_cost_nothing():
    x = torch.zeros(4, 4, device="cuda")
    assert not watched(nn.Module(), lambda: x.t()[1:].unsqueeze(0)).by_operation


def test_short_names_of_kernels_keep_the_function():
    fill = "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEESt5arrayIPcLm1EELb0EEEviT0_T1_"
    assert short_name(fill) == "vectorized_elementwise_kernel (FillFunctor)"
    assert short_name("cudnn") == "cudnn"
    assert short_name("_forward_kernel") == "_forward_kernel"


def test_counted_step_has_the_mode_of_the_table():
    """Inference in bfloat16 has no gradients and bfloat16 weights."""
    run = Run("ours", "inference-bfloat16", 1)
    with run.mode():
        model, step = make(run)
        logits = step()["pred_logits"]
    assert not logits.requires_grad
    assert model.dtype == torch.bfloat16
    assert logits.shape == (1, 300, 91)


@pytest.mark.slow
def test_inductors_kernels_are_counted():
    """Its kernels count by their tensors and its products as operators; elementwise operations share one kernel."""
    model, x = (
        nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)).cuda(),
        torch.zeros(512, 64, device="cuda"),
    )
    eager = watched(model, lambda: model(x).sum().backward())
    if torch.__version__ < (2, 12):
        pytest.skip("this PyTorch runs no compiled code while operators are watched: the table shows –")
    model.compile()
    model(x).sum().backward()
    with counted() as plain:
        model(x).sum().backward()
    with counted() as seen, Watch(model) as watch:
        model(x).sum().backward()
    costs = watch.by_operation.values()
    assert plain.launches == seen.launches == sum(cost.launches for cost in costs)
    assert sum(cost.flops for cost in costs) == sum(cost.flops for cost in eager.by_operation.values())
    [gelu] = [
        cost for (name, _), cost in watch.by_operation.items() if re.fullmatch(r"triton_poi_fused_.*gelu_\d", name)
    ]
    assert gelu.bytes == 2 * 4 * 512 * 128
    assert watch.by_part["compiled"].launches > 0
