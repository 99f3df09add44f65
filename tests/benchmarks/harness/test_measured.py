"""Tables of measurements per architecture, made from result files."""

import dataclasses
import math

import pytest
import torch

from conddetr.kernels import registry
from conddetr.kernels.records import Table, Verdict
from harness import measured, refusals, store
from harness.measured import combined, is_of_pytorch, tables
from harness.result import Result
from ops import attn, conv, dropout, relu_dropout, sine

H100 = {
    "date": "2026-11-29T12:00:00+00:00",
    "commit": "1234567",
    "device": "NVIDIA H100 80GB HBM3",
    "compute capability": "9.0",
    "torch": "2.15.0",
    "triton": "3.9.0",
    "driver": "590.1",
}
GOOD = Verdict("conditional_attention", "triton", "bfloat16", refused="", error=0.5, speedup=2.13)
PCIE = {**H100, "device": "NVIDIA H100 PCIe", "date": "2026-12-01T08:00:00+00:00"}
CPU = {**H100, "device": "some CPU, 2 threads", "compute capability": "none", "driver": "none"}
FORWARD = "25×34 keys, B = 8, forward, dropout 0.0, no padding, bfloat16"
BACKWARD = "25×34 keys, B = 8, forward + backward, dropout 0.1, no padding, bfloat16"
CANNOT = "backend 'triton' cannot run here: its kernels run on NVIDIA GPUs."


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a result file as a benchmark does on a machine with the given environment."""
    monkeypatch.setattr(store, "RESULTS", tmp_path)

    def written(environment: dict[str, str], benchmark: str, *results: Result):
        monkeypatch.setattr(store, "environment", lambda: environment)
        monkeypatch.setattr(store, "device_name", lambda: environment["device"])
        monkeypatch.setattr(store, "is_null_gpu", lambda: False)
        return store.write_results(benchmark, {}, list(results), [])

    return written


def test_table_has_mean_speedup_over_the_best_of_pytorch(write, tmp_path):
    forward = {
        "official eager": [8.0, 8.0, 8.0],
        # The median, not the mean.
        "SDPA": [4.0, 4.0, 40.0],
        # These two do not come with PyTorch.
        "FlashAttention-4": [0.1] * 3,
        "FlexAttention, FLASH": [0.1] * 3,
        "ours, triton, dense": [2.0, 2.0, 2.0],
        "ours, triton, separable": [1.0, 1.0, 1.0],
        "ours, native, dense": [5.0, 5.0, 5.0],
        # The operation does not pick this kernel on this GPU.
        "ours, native, dense, not Hopper's kernel": [0.1] * 3,
    }
    backward = {"SDPA": [6.0], "ours, triton, dense": [3.0], "ours, triton, separable": [2.0]}
    backward["ours, native, dense"] = [6.0]
    write(H100, "attn", Result(FORWARD, forward), Result(BACKWARD, backward))
    # A replayed graph counts as a separate problem.
    write(H100, "attn-cudagraph", Result(FORWARD, {"SDPA": [1.0], "ours, triton, dense": [1.0]}))
    write(CPU, "attn", Result(FORWARD, {"SDPA": [1.0], "ours, native, dense": [0.5]}))
    # Whole models are not operations.
    write(H100, "train", Result("conditional-detr-r50", {"peer": [1.0], "ours, triton": [0.5]}))
    [(architecture, table)] = tables(tmp_path).items()
    assert (architecture, table.architecture) == ("sm_90", "sm_90")
    assert list(table.gpus) == [H100["device"]]
    for part in ("torch 2.15.0", "triton 3.9.0", "driver 590.1", "commit 1234567", "2026-11-29"):
        assert part in table.gpus[H100["device"]]
    native, triton = table.verdicts
    assert (triton.operation, triton.backend, triton.dtype) == ("conditional_attention", "triton", "bfloat16")
    # 4 / 2, 4 / 1, 6 / 3, 6 / 2 and 1 / 1: the fifth root of 48.
    assert triton.speedup == 2.169
    assert (triton.refused, triton.error) == ("", None)
    # 4 / 5 and 6 / 6: the root of 0.8.
    assert native.speedup == 0.8944
    assert native.refused == "it is slower than PyTorch on NVIDIA H100 80GB HBM3: 0.89× its speed."


def test_wrong_kernel_is_refused_at_any_speed(write, tmp_path):
    wrong = f"{refusals.WRONG}error of out 3.0e-01, eager 1.0e-03"
    results = [
        Result("pooling, 2×64×400×533, float32", {"PyTorch": [2.0], "ours, triton": [1.0]}),
        Result("pooling, 8×64×400×533, float32", {"PyTorch": [2.0]}, refused={"ours, triton": wrong}),
    ]
    write(H100, "pool", *results)
    [verdict] = tables(tmp_path)["sm_90"].verdicts
    assert verdict.refused == f"{wrong} (pooling, 8×64×400×533, float32)."
    assert verdict.speedup == 2.0


def test_kernel_that_cannot_run_or_was_not_compared_has_no_verdict(write, tmp_path):
    refused = {"ours, triton": CANNOT, "SDPA": f"{refusals.WRONG}of a peer", refusals.PROBLEM: f"{refusals.FAILED}it"}
    write(H100, "pool", Result("pooling, 2×64×400×533, float32", {"PyTorch": [2.0]}, refused=refused))
    write(H100, "focal", Result("focal loss, 6 layers, float64", {"torchvision": [2.0], "ours, triton": [1.0]}))
    assert tables(tmp_path)["sm_90"].verdicts == ()


def test_no_speedup_without_a_peer(write, tmp_path):
    write(H100, "pool", Result("pooling, 2×64×400×533, float32", {"ours, triton": [1.0]}))
    assert tables(tmp_path)["sm_90"].verdicts == (Verdict("max_pool", "triton", "float32", "", None, None),)


def test_our_eager_counts_as_a_peer_and_auto_does_not(write, tmp_path):
    seconds = {"PyTorch": [4.0], "ours, eager": [3.0], "ours, auto": [0.5], "ours, triton": [1.0]}
    write(H100, "conv", Result("convolution 1×1, in, 8×256×200×267, forward, float32, TF32 off", seconds))
    [verdict] = tables(tmp_path)["sm_90"].verdicts
    assert (verdict.operation, verdict.dtype, verdict.speedup) == ("convolution", "float32", 3.0)


def test_worse_of_two_gpus_of_an_architecture_counts(write, tmp_path):
    title = "pooling, 2×64×400×533, float32"
    write(H100, "pool", Result(title, {"PyTorch": [4.0], "ours, triton": [1.0]}))
    write(PCIE, "pool", Result(title, {"PyTorch": [3.0], "ours, triton": [1.0]}))
    table = tables(tmp_path)["sm_90"]
    assert set(table.gpus) == {H100["device"], PCIE["device"]}
    assert [verdict.speedup for verdict in table.verdicts] == [3.0]
    write(PCIE, "pool", Result(title, {"PyTorch": [1.0], "ours, triton": [2.0]}))
    [verdict] = tables(tmp_path)["sm_90"].verdicts
    assert verdict.refused == "it is slower than PyTorch on NVIDIA H100 PCIe: 0.50× its speed."


def test_each_architecture_has_its_own_table(write, tmp_path):
    title = "pooling, 2×64×400×533, float32"
    a100 = {**H100, "device": "NVIDIA A100-SXM4-80GB", "compute capability": "8.0", "driver": "unknown"}
    write(H100, "pool", Result(title, {"PyTorch": [4.0], "ours, triton": [1.0]}))
    write(a100, "pool", Result(title, {"PyTorch": [2.0], "ours, triton": [1.0]}))
    by_architecture = tables(tmp_path)
    assert {name: table.verdicts[0].speedup for name, table in by_architecture.items()} == {"sm_80": 2.0, "sm_90": 4.0}
    assert list(by_architecture["sm_80"].gpus) == [a100["device"]]


@pytest.mark.parametrize("capability", [None, "none", "90"])
def test_results_of_a_gpu_without_its_capability_are_an_error(write, tmp_path, capability):
    environment = {name: value for name, value in H100.items() if name != "compute capability"}
    environment |= {"compute capability": capability} if capability else {}
    path = write(environment, "pool", Result("pooling, float32", {"PyTorch": [4.0], "ours, triton": [1.0]}))
    with pytest.raises(ValueError, match=f"{path}: expected the compute capability of NVIDIA H100"):
        tables(tmp_path)


@pytest.mark.parametrize(
    ("stem", "problem", "operation"),
    [
        ("attn", attn.Problem("r50", 2, torch.float16, 0.1, True, True), "conditional_attention"),
        ("conv", conv.Problem("pair, 1×1 and 3×3, strided", 2, (800, 1066), True), "convolution_pair"),
        ("conv", conv.Problem("3×3", 2, (800, 1066), True), "convolution"),
        ("dropout", dropout.Problem(600, torch.bfloat16), "dropout_add"),
        ("relu_dropout", relu_dropout.Problem(600, torch.bfloat16), "relu_dropout"),
        ("sine", sine.Problem("sine_embedding", 100, torch.float32, True), "sine_embedding"),
        ("sine", sine.Problem("conditional_spatial_query", 100, torch.float32, True), "conditional_spatial_query"),
    ],
)
def test_title_determines_operation_and_dtype(stem, problem, operation):
    [verdict] = measured.verdicts(stem, Result(problem.title, {"peer": [2.0], "ours, triton": [1.0]}))
    assert verdict.operation == operation
    assert verdict.dtype == str(problem.dtype).removeprefix("torch.")


def test_operations_are_those_of_the_registry():
    """Except a pair of convolutions, which has no choice of its own. Every operation that runs on a GPU is included."""
    timed = {operation for by_title in measured.OPERATIONS.values() for operation in by_title.values()}
    # The gradient is timed together with its convolution.
    untimed = {"self_attention", "convolution_3x3_weight_gradient"}
    assert timed - {"convolution_pair"} == set(registry.OPERATIONS) - untimed


def test_only_peers_count_as_pytorch():
    ours = ("ours, triton", "ours, native, dense", "ours, auto", "ours, triton, compiled")
    assert [name for name in (*ours, *measured.OTHERS) if is_of_pytorch(name)] == []
    peers = ("official eager", "torch.compile of it", "SDPA, cuDNN", "FlexAttention", "varlen_attn", "ours, eager")
    assert all(is_of_pytorch(name) for name in peers)


def test_command_writes_tables_and_removes_old_ones(write, tmp_path, capsys):
    write(H100, "pool", Result("pooling, float32", {"PyTorch": [4.0], "ours, triton": [1.0]}))
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "sm_70.json").write_text("{}")
    measured.main(["--results", str(tmp_path), "--tables", str(folder)])
    assert [path.name for path in folder.iterdir()] == ["sm_90.json"]
    assert Table.from_json((folder / "sm_90.json").read_bytes()) == tables(tmp_path)["sm_90"]
    assert str(folder / "sm_90.json") in capsys.readouterr().out


def test_shipped_tables_match_the_committed_results():
    shipped = {path.stem: Table.from_json(path.read_bytes()) for path in measured.TABLES.glob("*")}
    assert shipped == tables(store.RESULTS), "run: python benchmarks/run.py measured"


def test_problems_are_combined_into_one_verdict():
    fast, equal, untimed = (
        dataclasses.replace(GOOD, error=error, speedup=speedup)
        for error, speedup in ((0.2, 4.0), (0.9, 1.0), (0.1, None))
    )
    # The mean of 4 and 1 is that of their logarithms.
    assert combined([fast, equal, untimed], "here") == dataclasses.replace(GOOD, error=0.9, speedup=2.0)
    # With equal times neither is slower, however the mean is rounded.
    even = [dataclasses.replace(GOOD, speedup=speedup) for speedup in (7.0, 1 / 7.0)]
    assert (combined(even, "here").speedup, combined(even, "here").refused) == (1.0, "")
    assert combined([untimed], "here").speedup is None
    slow = combined([dataclasses.replace(GOOD, speedup=speedup) for speedup in (0.5, 1.28)], "on this GPU")
    assert slow.refused == "it is slower than PyTorch on this GPU: 0.80× its speed."
    wrong = dataclasses.replace(GOOD, refused="it is wrong.", error=math.nan)
    verdict = combined([fast, wrong, equal], "here")
    assert (verdict.refused, verdict.error) == ("it is wrong.", None)
