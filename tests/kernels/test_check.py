"""The check of kernels: sound kernels pass, every fault is reported by name, and the process is left unchanged."""

import contextlib
import ctypes
import dataclasses
import importlib
import itertools
import json
import re
import time

import pytest
import torch

import conddetr
from conddetr.cli import main
from conddetr.kernels import native, records, registry
from conddetr.kernels.check import budget
from conddetr.kernels.check.cases import problems
from conddetr.kernels.check.guards import MARGIN, Guards
from conddetr.kernels.check.inputs import Maker
from conddetr.kernels.check.isolation import isolated, poisoned
from conddetr.kernels.check.rows import Row, judge
from conddetr.kernels.check.table import summary
from conddetr.kernels.check.verify import verify
from conddetr.kernels.cpu.dropout import op as dropout

CPU = torch.device("cpu")
# Through importlib, because the package's attribute of this name is the function.
check_module = importlib.import_module("conddetr.kernels.check")
HAS_NATIVE = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
HAS_INTERPRETER = pytest.mark.skipif(
    registry.why_not("triton", CPU, torch.float32) is not None, reason="no Triton that runs on a CPU"
)
ODD = "no multiples of tiles, with gaps in memory"


def find(operation, title):
    [problem] = [x for x in problems(1) if (x.operation, x.title) == (operation, title)]
    return problem


def small(operation="dropout_add"):
    """A problem without gaps in memory, large enough that two samples differ."""
    problem = find(operation, ODD)
    made = problem.make

    def make(maker):
        return {name: x.contiguous() for name, x in made(maker).items()}

    return dataclasses.replace(problem, title="small", make=make)


def findings(problem, backend, dtype=torch.float32):
    with isolated(CPU):
        return verify(problem, backend, dtype, CPU)


@pytest.fixture
def sabotage(monkeypatch):
    """Replaces the native kernels' dropout by a function of the sound one and its arguments."""

    def replace(wrong):
        sound = dropout.drop
        monkeypatch.setattr(dropout, "drop", lambda *arguments: wrong(sound, *arguments))

    return replace


def test_every_operation_has_problems():
    for images in (2, 8):
        every = problems(images)
        assert {problem.operation for problem in every} == set(registry.OPERATIONS)
        for operation in registry.OPERATIONS:
            selected = [problem for problem in every if problem.operation == operation]
            assert selected[0].is_model
            assert not selected[-1].is_model
            assert len({problem.title for problem in selected}) == len(selected)


def test_inputs_are_the_same_on_every_run():
    for problem in (find("add_norm", ODD), find("linear_assignment", "many objects")):
        first, second = (problem.make(Maker(CPU, torch.bfloat16)) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("operation", sorted(registry.OPERATIONS))
def test_plain_pytorch_is_within_its_own_budget(operation):
    """This proves each problem's own parts: its exact results, its kept elements and its equal bits."""
    for problem in problems(1):
        is_small = not (problem.is_model or problem.is_tf32 or problem.title.startswith("dense"))
        if problem.operation == operation and is_small:
            finding = findings(problem, "eager")
            assert finding.wrong is None, problem.title
            assert finding.error <= 0.5, problem.title


@HAS_INTERPRETER
@pytest.mark.parametrize(
    ("operation", "title"),
    [("focal_loss", "one of everything"), ("prepare_weights", "small and odd"), ("relu_dropout", ODD)],
)
def test_sound_triton_kernels_pass(operation, title):
    finding = findings(find(operation, title), "triton")
    assert finding.wrong is None
    assert 0 <= finding.error <= 1


@HAS_NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_native_kernels_pass(dtype):
    for problem in (small(), small("relu_dropout"), find("conditional_attention", "one row of cells, dropout")):
        finding = findings(problem, "native", dtype)
        assert finding.wrong is None, problem.operation
        assert 0 < finding.error <= 1, problem.operation


def slightly_wrong(sound, *arguments):
    return sound(*arguments) * 1.0001


def wrong_in_a_gradient(sound, *arguments):
    out = sound(*arguments)
    return out + 0.01 * (out - out.detach())


def one_element_unwritten(sound, *arguments):
    out = sound(*arguments)
    out.data.view(-1)[-1:] = torch.empty(1)
    return out


def dropping_twice_as_many(sound, x, residual, seed, p, relu):
    out = sound(x, None, seed, 2 * p, relu) * ((1 - 2 * p) / (1 - p))
    return out if residual is None else out + residual


def dropping_always_the_same(sound, x, residual, seed, p, relu):
    return sound(x, residual, torch.ones_like(seed), p, relu)


def another_mask_in_backward(sound, x, residual, seed, p, relu):
    reseeded = sound(x, residual, seed + 1, p, relu)
    return sound(x, residual, seed, p, relu).detach() + reseeded - reseeded.detach()


def writing_past_its_input(sound, x, *others):
    ctypes.memset(x.data_ptr() + x.numel() * x.element_size() + 8, 0, 4)
    return sound(x, *others)


def writing_before_its_input(sound, x, residual, *others):
    if residual is not None:
        ctypes.memset(residual.data_ptr() - 4, 0, 4)
    return sound(x, residual, *others)


def changing_its_input(sound, x, *others):
    out = sound(x, *others)
    x.data.view(-1)[0] += 1
    return out


def raising(*_):
    raise ArithmeticError("no such launch\nsecond line")


def another_dtype(sound, *arguments):
    return sound(*arguments).double()


CALLS = itertools.count()


def unsteady(sound, *arguments):
    """Off by another rounding every time, within the budget."""
    return sound(*arguments) * (1 + next(CALLS) % 3 * 1.2e-7)


@HAS_NATIVE
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (slightly_wrong, r"^result is off by [\d.]+ times its error budget$"),
        (wrong_in_a_gradient, r"^gradient of x is off by [\d.e+]+ times its error budget$"),
        (another_mask_in_backward, r"^gradient of x is off by [\d.e+]+ times its error budget$"),
        (one_element_unwritten, "^result is not finite$"),
        (unsteady, "^result differs between two runs on the same inputs$"),
        (dropping_twice_as_many, r"^drops [56]\d\.\d\d% of the elements, expected 30.00%$"),
        (dropping_always_the_same, "^drops the same elements for every seed$"),
        (writing_past_its_input, "^writes outside: 8 bytes past the end of x$"),
        (writing_before_its_input, "^writes outside: 4 bytes before residual$"),
        (changing_its_input, "^changes its input x$"),
        (raising, "^raises ArithmeticError: no such launch$"),
        (another_dtype, r"^result: expected \(3, 7, 33\) torch.float32, got \(3, 7, 33\) torch.float64$"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_fault_is_reported(wrong, message, sabotage):
    sabotage(wrong)
    finding = findings(small(), "native")
    assert finding.wrong is not None
    assert re.search(message, finding.wrong), finding.wrong


@HAS_INTERPRETER
@pytest.mark.parametrize("where", ["result", "gradient"])
def test_faults_of_a_triton_kernel_are_reported(where, monkeypatch):
    """One kernel writes past the memory that it allocated, another is wrong only in backward."""
    kernels = importlib.import_module("conddetr.kernels.prediction.triton")
    forward, backward = kernels.forward, kernels.backward

    def beyond(*arguments):
        out = forward(*arguments)
        ctypes.memset(out.data_ptr() + out.numel() * out.element_size(), 0, 1)
        return out

    def off(*arguments):
        offsets_grad, points_grad = backward(*arguments)
        return offsets_grad, points_grad * 1.001

    if where == "result":
        monkeypatch.setattr(kernels, "forward", beyond)
    else:
        monkeypatch.setattr(kernels, "backward", off)
    wrong = findings(find("predicted_boxes", "one query"), "triton").wrong
    if where == "result":
        assert wrong == "writes outside: 0 bytes past the end of its own memory"
    else:
        assert wrong.startswith("gradient of points is ")


def test_suboptimal_or_incomplete_assignment_is_reported():
    problem = find("linear_assignment", "many objects")
    inputs = problem.make(Maker(CPU, torch.float32))
    best = problem.run(inputs, "eager")
    assert problem.judge(inputs, best, best) is None
    swapped = best[0].clone()
    queries = (swapped[0, 1] >= 0).nonzero()[:2, 0]
    swapped[0, 1, queries] = swapped[0, 1, queries.flip(0)]
    assert "image 1 of layer 0: its cost is" in problem.judge(inputs, [swapped], best)
    swapped[0, 0, 0] = 0 if best[0][0, 0, 0] != 0 else -1
    assert problem.judge(inputs, [swapped], best) == "image 0 of layer 0: not every object has one query"


@HAS_NATIVE
def test_slow_or_wrong_kernel_is_refused(sabotage, monkeypatch):
    row = Row("dropout_add", "native", torch.float32, (dataclasses.replace(small(), is_model=True),))
    with isolated(CPU):
        sabotage(lambda sound, *arguments: time.sleep(0.005) or sound(*arguments))
        verdict = judge(row, CPU, lambda verified: None)
        assert verdict.refused.startswith("it is slower than PyTorch here: 0.")
        assert verdict.speedup < 0.95
        assert verdict.error <= 1
        sabotage(slightly_wrong)
        verdict = judge(row, CPU, lambda verified: None)
    assert verdict.refused.startswith("small: result is ")
    assert verdict.error > 1
    assert verdict.speedup is None


def test_guards_keep_numbers_and_strides():
    x = torch.arange(24.0).view(2, 3, 4)
    inputs = {"transposed": x.transpose(0, 2), "gaps": x[:, ::2, ::3], "expanded": x[:1].expand(5, 3, 4)}
    inputs |= {"none": x[:0], "flags": x > 3, "scalar": x[1, 1, 1]}
    guards = Guards()
    placed = guards.place(inputs)
    for name, tensor in inputs.items():
        assert torch.equal(placed[name], tensor), name
        assert placed[name].stride() == tensor.stride(), name
        assert placed[name].storage_offset() == 0
        assert placed[name]._base is None
        assert placed[name].data_ptr() % 16 == 0 or name == "none"
    with guards.watching():
        made = [
            torch.empty(3),
            torch.empty_like(x),
            x.new_empty((2, 2), dtype=torch.int64),
            torch.empty(2, device="meta"),
        ]
    assert made[0].isnan().all()
    assert (made[2] == -1).all()
    assert guards.violation() is None
    ctypes.memset(made[1].data_ptr() - MARGIN, 0, 1)
    assert guards.violation() == f"writes outside: {MARGIN} bytes before its own memory"
    assert torch.empty(3)._base is None
    assert torch.Tensor.new_empty is torch._C.TensorBase.new_empty


def test_budget():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1000, generator=generator, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = truth.to(dtype)
        assert budget.share(rounded, rounded, truth, 1.0) <= 0.5
        off = rounded.clone()
        off[17] += 0.5
        assert budget.share(off, rounded, truth, 1.0) > 1, "one element"
        assert budget.share((1.03 * truth).to(dtype), rounded, truth, 1.0) > 1, "all elements slightly"
    zeros = torch.zeros(3, dtype=torch.float64)
    assert budget.share(torch.full((3,), 1e-7), torch.zeros(3), zeros, 1.0) < 1, "relative to the largest result"
    assert budget.share(torch.full((3,), 1e-4), torch.zeros(3), zeros, 1.0) > 1
    assert budget.share(torch.tensor([torch.nan]), torch.zeros(1), zeros[:1], 1.0) == float("inf")


def test_state_of_the_process_is_restored():
    def state():
        switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        return (
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            [switch.fp32_precision for switch in switches],
            torch.backends.cudnn.allow_tf32,
            torch.is_grad_enabled(),
        )

    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_default_dtype(torch.float64)
    try:
        before = state()
        with contextlib.suppress(InterruptedError), torch.no_grad(), isolated(CPU), poisoned():
            assert torch.is_grad_enabled()
            assert torch.get_default_dtype() == torch.float32
            assert torch.empty(2).isnan().all()
            torch.manual_seed(99)
            raise InterruptedError
        assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def two_problems(monkeypatch, tmp_path):
    """Limits the check to these problems, and gives it an empty cache folder."""
    monkeypatch.setenv("CONDDETR_CACHE", str(tmp_path))
    records.forget()
    chosen = [dataclasses.replace(small(), is_model=True), find("dropout_add", "one element")]
    monkeypatch.setattr(check_module, "problems", lambda images: chosen)
    yield chosen
    records.forget()


@HAS_NATIVE
def test_record_is_saved_and_loaded(two_problems):
    steps = []
    record = conddetr.kernels.check("cpu", progress=lambda *step: steps.append(step))
    assert [(x.operation, x.backend, x.dtype) for x in record.verdicts] == [
        ("dropout_add", "native", dtype) for dtype in ("float32", "bfloat16")
    ]
    assert not record.is_short
    assert record.identity == records.identity(CPU)
    assert steps[0] == ("dropout_add, native, float32", 0, 6)
    assert steps[-1] == ("done", 6, 6)
    records.forget()
    assert records.load(CPU) == record


@HAS_NATIVE
def test_short_check_keeps_other_verdicts(two_problems):
    conddetr.kernels.check("cpu", short=True, dtypes=[torch.bfloat16])
    assert records.load(CPU).is_short
    record = conddetr.kernels.check("cpu", short=True, dtypes=[torch.float32])
    assert [x.dtype for x in record.verdicts] == ["float32", "bfloat16"]
    full = conddetr.kernels.check("cpu")
    assert not full.is_short
    odd = dataclasses.replace(full.verdicts[0], refused="one element: result is not finite.")
    records.adopt(CPU, dataclasses.replace(full, verdicts=(odd, *full.verdicts[1:])))
    again = conddetr.kernels.check("cpu", short=True, dtypes=[torch.float32])
    assert not again.is_short
    assert again.verdicts[0] == odd, "the refusal at a size of the full check stays"
    assert not any("one element" in x.refused for x in conddetr.kernels.check("cpu").verdicts)


@pytest.mark.parametrize("after", [0, 3])
def test_interrupted_check_leaves_no_record(two_problems, after, tmp_path):
    def interrupt(step, done, total):
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conddetr.kernels.check("cpu", progress=interrupt)
    assert records.load(CPU) is None
    assert list(tmp_path.rglob("*")) == []


def test_full_gpu_is_no_fault_of_a_kernel_and_failed_gpu_refuses_the_rest(two_problems, monkeypatch):
    def full(row, device, tell):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(check_module, "_why_not", lambda row, device: None)
    monkeypatch.setattr(check_module, "judge", full)
    report = check_module.examine("cpu", dtypes=[torch.float32, torch.bfloat16])
    assert report.record.verdicts == ()
    assert list(report.unavailable) == ["the GPU has no memory left for the check."]
    # The next process checks again; in this process the refusals hold.
    assert summary(report)[-1].endswith("no record is kept")
    assert {x.refused for x in records.load(CPU).verdicts} == {"the GPU has no memory left for the check."}
    records.forget()
    assert records.load(CPU) is None
    monkeypatch.setattr(check_module, "judge", lambda row, device, tell: row.verdict("it raises.", None, None))
    lost = "not checked, because the GPU failed at {}."
    monkeypatch.setattr(check_module, "_stopped", lambda device, title: lost.format(title))
    report = check_module.examine("cpu", dtypes=[torch.float32, torch.bfloat16])
    first, second = report.record.verdicts
    assert first.refused == "it raises."
    assert second.refused == "not checked, because the GPU failed at dropout_add, native, float32."


def test_only_kernels_that_auto_may_choose_are_timed():
    rows = {(row.operation, row.backend, row.dtype): row for row in check_module._rows(CPU, check_module.FLOATS, True)}
    assert rows["spatial_query", "triton", torch.bfloat16].is_timed
    assert not rows["spatial_query", "triton", torch.float32].is_timed
    assert all(problem.is_model for row in rows.values() for problem in row.problems)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got 'gpu'"):
        conddetr.kernels.check("gpu")
    with pytest.raises(ValueError, match="expected cpu, cuda or cuda:N, got 'meta': other devices have no kernels"):
        conddetr.kernels.check("meta")
    with pytest.raises(ValueError, match=r"dtypes: expected some of torch.float32, .*, got torch.float64"):
        conddetr.kernels.check("cpu", dtypes=[torch.float64])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: got 'cuda', but PyTorch sees no GPU here"):
            conddetr.kernels.check("cuda")


@HAS_NATIVE
def test_command_prints_a_table_and_the_path_of_the_record(two_problems, sabotage, capsys, tmp_path):
    file = tmp_path / "out" / "check.json"
    # Not timed: the machine may be busy.
    two_problems[0] = dataclasses.replace(two_problems[0], is_model=False)
    assert main(["check", "--device", "cpu", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"dropout_add +native +bfloat16 +0\.\d\d +none +ok", printed)
    assert "not available: 1 (on cpu its kernels take float32, bfloat16, float64, not float16)" in printed
    assert "2 ok, 0 refused, 1 not available; record: " in printed
    assert str(records.path(CPU)) in printed
    assert [x["dtype"] for x in json.loads(file.read_text())["content"]["verdicts"]] == ["float32", "bfloat16"]
    # The table is printed even if the file cannot be written.
    assert main(["check", "--device", "cpu", "--json", str(file / "record.json")]) == 2
    assert "2 ok, 0 refused, 1 not available; record: " in capsys.readouterr().out
    sabotage(slightly_wrong)
    assert main(["check", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "REFUSED: dropout_add, native, float32: small: result is " in printed
    assert "1 ok, 1 refused, 1 not available" in printed
    assert not records.verdict("dropout_add", "native", CPU, torch.bfloat16).refused


@HAS_NATIVE
def test_unavailable_kernel_is_not_refused(two_problems, monkeypatch):
    monkeypatch.setattr(native, "NOT_LOADED", "the native kernels are not built.")
    report = check_module.examine("cpu")
    assert report.record.verdicts == ()
    assert report.unavailable == {"the native kernels are not built.": [
        f"dropout_add, native, {dtype}" for dtype in ("float32", "bfloat16", "float16")
    ]}  # fmt: skip


@HAS_NATIVE
def test_device_with_wrong_sums_refuses_every_kernel(two_problems, monkeypatch):
    monkeypatch.setattr(check_module, "_computes", lambda device: False)
    verdicts = conddetr.kernels.check("cpu").verdicts
    assert len(verdicts) == 2
    assert all(x.refused == "plain PyTorch computes wrong sums on cpu." for x in verdicts)
