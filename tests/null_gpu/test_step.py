"""What a step asks of a device: the count of operations, and ours held to the committed numbers."""

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


def held() -> list:
    """The runs of ours in the file; what Inductor makes takes minutes."""
    runs = [run for run in COMMITTED if run.implementation == "ours"]
    slow = [run for run in runs if (run.work, run.batch) not in QUICK]
    return [pytest.param(run, marks=[pytest.mark.slow] * (run in slow), id=run.title) for run in runs]


def above(found: dict, committed: dict) -> dict[str, tuple]:
    """Numbers that are larger than the committed ones, with those.

    Which of several free blocks the allocator takes depends on addresses, and so do a few parts of the peak.
    """
    numbers, limits = ({**run["counted"], **run["predicted"]} for run in (found, committed))
    spread = {"peak bytes": 2 << 20, "seconds on the device": 1e-9}
    return {name: (n, limits[name]) for name, n in numbers.items() if n > limits[name] + spread.get(name, 0)}


@pytest.mark.parametrize("run", held())
def test_ours_asks_for_no_more_than_the_committed_file_says(run, monkeypatch):
    """A change that saves something writes the file anew: python benchmarks/run.py step --only ours."""
    # As PyTorch comes: cuDNN's fused convolutions know of no deterministic algorithms.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    committed = COMMITTED[run]
    found = count(run)
    more = above(found, committed)
    versions = [
        {name: versions[name] for name in ("torch", "triton")}
        for versions in (found["versions"], committed["versions"])
    ]
    if versions[0] != versions[1]:
        pytest.skip(
            f"{found['counted']} with {versions[0]}; the committed numbers are of {versions[1]}; above them: {more}"
        )
    assert not more
    assert set(found["FLOPs not known"]) <= set(committed["FLOPs not known"])


def test_a_number_above_the_file_is_found():
    committed = COMMITTED[Run("ours", "training", 8)]
    assert above(committed, committed) == {}
    for kind in ("counted", "predicted"):
        for name, value in committed[kind].items():
            larger = value + 1e-8 if kind == "predicted" else value + 1 + (2 << 20)
            more = {**committed, kind: {**committed[kind], name: larger}}
            assert above(more, committed) == {name: (larger, value)}


def test_a_file_may_be_anywhere(tmp_path):
    path = tmp_path / "some" / "where.json"
    write(path, COMMITTED)
    assert read(path) == COMMITTED


def test_every_implementation_of_the_file_is_known():
    assert {run.implementation for run in COMMITTED} <= set(IMPLEMENTATIONS)


class Small(nn.Module):
    """Parts with the names that models have."""

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


def test_backward_belongs_to_the_part_whose_forward_it_is():
    model, x = Small().cuda(), torch.zeros(2, 3, 8, 8, device="cuda")
    forward = watched(model, lambda: model(x)).by_part
    both = watched(model, lambda: model(x).sum().backward()).by_part
    # A convolution has two products in backward, less the one for the image; a linear layer has two.
    assert both["backbone"].flops == 2 * forward["backbone"].flops
    for part in ("encoder", "decoder", "heads and loss"):
        assert both[part].flops == 3 * forward[part].flops > 0
    # exp, its gradient, the sum, and what that begins with.
    assert 0 < both["other"].launches <= 5
    assert both["other"].flops == 0


def cost(operation):
    """What one operation costs, and its name."""
    watch = watched(nn.Module(), operation)
    [(name, _)] = watch.by_operation
    assert list(watch.by_part) == ["other"]
    return name, watch.by_part["other"], watch.without_formula


def test_bytes_are_read_and_written_once():
    x, row = torch.zeros(256, 1024, device="cuda"), torch.zeros(1024, device="cuda")
    assert cost(lambda: x + row)[1].bytes == 2 * x.nbytes + row.nbytes
    assert cost(lambda: x + row.expand_as(x))[1].bytes == 2 * x.nbytes + row.nbytes
    assert cost(lambda: x.relu_())[1].bytes == 2 * x.nbytes
    assert cost(lambda: x.zero_())[1].bytes == x.nbytes


def test_products_are_counted_as_they_are_written():
    x, weight, bias = (
        torch.zeros(s, device="cuda", dtype=torch.bfloat16) for s in ((2, 8, 32, 32), (8, 8, 3, 3), (8,))
    )
    one = (1, 1)
    flops = 2 * 9 * 8 * x.numel()
    name, found, unknown = cost(lambda: torch.cudnn_convolution_relu(x, weight, bias, one, one, one, 1))
    assert (name, found.flops, found.launches, unknown) == ("cudnn_convolution_relu", flops, 1, set())
    assert cost(lambda: torch.cudnn_convolution_add_relu(x, weight, x, 1.0, bias, one, one, one, 1))[1].flops == flops
    assert cost(lambda: torch.conv2d(x, weight, None, padding=1))[1].flops == flops
    left = torch.zeros(512, 512, device="cuda")
    assert cost(lambda: left @ left)[1].flops == 2 * 512**3


def test_time_is_the_largest_of_three():
    small, large = torch.zeros(8, device="cuda"), torch.zeros(1 << 26, device="cuda")
    assert cost(lambda: small + 1)[1].seconds == LAUNCH
    assert cost(lambda: large + 1)[1].seconds == pytest.approx(2 * large.nbytes / BANDWIDTH)
    square = torch.zeros(4096, 4096, device="cuda")
    assert cost(lambda: square @ square)[1].seconds == pytest.approx(2 * 4096**3 / RATES["float32"])


@triton.jit
def twice_kernel(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, 2 * tl.load(x + at))


def test_a_kernel_without_an_operator_is_seen_and_named():
    x, large = torch.zeros(1024, device="cuda"), torch.zeros(1 << 21, device="cuda")
    name, found, unknown = cost(lambda: twice_kernel[(1,)](x, x[512:], 512))
    assert (name, found.launches, found.bytes) == ("twice_kernel", 1, x.nbytes + x.nbytes // 2)
    assert unknown == set()
    assert cost(lambda: twice_kernel[(1,)](large, large, 512))[2] == {"twice_kernel"}


def test_views_ask_for_nothing():
    x = torch.zeros(4, 4, device="cuda")
    assert not watched(nn.Module(), lambda: x.t()[1:].unsqueeze(0)).by_operation


def test_names_of_kernels_say_what_they_do():
    fill = "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEESt5arrayIPcLm1EELb0EEEviT0_T1_"
    assert short_name(fill) == "vectorized_elementwise_kernel (FillFunctor)"
    assert short_name("cudnn") == "cudnn"
    assert short_name("_forward_kernel") == "_forward_kernel"


def test_what_is_counted_is_the_step_of_the_table():
    """Inference has no gradients, and runs in bfloat16."""
    run = Run("ours", "inference-bfloat16", 1)
    with run.mode():
        model, step = make(run)
        found = step()["pred_logits"]
    assert not found.requires_grad
    assert model.dtype == torch.bfloat16
    assert found.shape == (1, 300, 91)


@pytest.mark.slow
def test_what_inductor_makes_is_seen_too():
    """Its kernels by their tensors, its products as operators; it needs no other kernel for what is elementwise."""
    model, x = (
        nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)).cuda(),
        torch.zeros(512, 64, device="cuda"),
    )
    eager = watched(model, lambda: model(x).sum().backward())
    if torch.__version__ < (2, 12):
        pytest.skip("this PyTorch runs no compiled code while operators are watched: the table says –")
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
