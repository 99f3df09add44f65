"""Graphs of a module: replays give the results of calls, and the module is called if a graph would miss something."""

import copy
import logging
import pickle

import null_gpu
import pytest
import torch
import torch.distributed as dist
from recorder import CAPTURE
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import conddetr
from conddetr import graphed
from conddetr.graphed import Graphs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.compares_numbers,
    # Newer PyTorch gives this warning if a recording uses results of another stream.
    pytest.mark.filterwarnings("error:The AccumulateGrad node's stream"),
]


class Model(nn.Module):
    """Two outputs with gradients and one without, an unused parameter, and statistics."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 7), nn.Linear(7, 3)
        self.norm, self.dropout = nn.BatchNorm1d(7), nn.Dropout(0.0)
        self.unused = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.graphs = None
        self.calls = []

    def forward(self, x, scale=None):
        outputs = None if self.graphs is None else self.graphs(self, self.compute, (x, scale))
        return self.compute(x, scale) if outputs is None else outputs

    def compute(self, x, scale=None):
        self.calls.append(None)
        hidden = self.dropout(self.norm(self.inner(x)) * self.frozen).relu()
        out = self.outer(hidden)
        return {"out": out if scale is None else out * scale, "more": [hidden, x > 0]}


def models():
    """The same model with graphs and without."""
    torch.manual_seed(0)
    plain = Model().to(DEVICE)
    with_graphs = copy.deepcopy(plain)
    with_graphs.graphs = Graphs(CAPTURE)
    return with_graphs, plain


def inputs(seed=0, rows=4):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loss_of(outputs):
    return outputs["out"].square().sum() + outputs["more"][0].sin().sum()


def assert_same_state(actual, expected):
    for (name, a), (_, b) in zip(actual.state_dict().items(), expected.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, a), (_, b) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def replays(model, *args):
    """Call the model; returns (whether a graph was replayed, the outputs)."""
    before = len(model.calls)
    outputs = model(*args)
    return len(model.calls) == before, outputs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_steps_equal_called_steps(accumulate):
    """Outputs, gradients, weights and statistics agree, for two shapes in turn; gradients may accumulate."""
    pair = models()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in pair]
    for step in range(6):
        x = inputs(step, rows=4 + step % 2)
        results = []
        for model, optimizer in zip(pair, optimizers, strict=True):
            outputs = model(x, torch.full((), 1.0 + step, device=DEVICE))
            loss_of(outputs).backward()
            results.append(outputs)
            if step % accumulate == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(results[0], results[1])
        assert_same_state(*pair)
    assert len(pair[0].graphs) == 2
    assert replays(pair[0], x)[0] is False, (
        "without the second input it is a new kind of inputs, which is recorded first"
    )
    assert replays(pair[0], x)[0] is True


def test_each_call_returns_new_memory():
    model, _ = models()
    first = model(inputs(1))
    loss_of(first).backward()
    kept = [tensor.clone() for tensor in tree_leaves(first)], model.inner.weight.grad, model.inner.weight.grad.clone()
    model.zero_grad()
    loss_of(model(inputs(2))).backward()
    torch.testing.assert_close(tree_leaves(first), kept[0])
    torch.testing.assert_close(kept[1], kept[2])


def test_unused_output_has_a_gradient_of_zeros():
    """A step that does not use an output must not get its gradient of the step before."""
    model, plain = models()
    for step in range(3):
        for module in (model, plain):
            module.zero_grad()
            outputs = module(inputs(step))
            (outputs["out"] if step == 1 else outputs["more"][0]).sum().backward()
        for name, parameter in plain.named_parameters():
            actual, expected = model.get_parameter(name).grad, parameter.grad
            if expected is None and name.startswith("outer"):
                expected = torch.zeros_like(parameter)
            assert (actual is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(actual, expected, msg=name)


def test_replayed_inference_equals_called_inference():
    model, plain = models()
    for module in (model, plain):
        module.eval()
    with torch.inference_mode():
        model(inputs())
    for seed, mode in enumerate((torch.inference_mode, torch.no_grad)):
        with mode():
            replayed, outputs = replays(model, inputs(seed))
            torch.testing.assert_close(outputs, plain(inputs(seed)))
        assert replayed


def test_random_numbers_differ_between_replays():
    model, _ = models()
    model.dropout.p = 0.5
    outputs = [model(inputs())["more"][0].detach() for _ in range(3)]
    assert not torch.equal(outputs[1], outputs[2])


def test_recording_changes_neither_random_numbers_nor_statistics():
    model, plain = models()
    torch.manual_seed(7)
    model(inputs())
    numbers = torch.rand(3, device=DEVICE)
    torch.manual_seed(7)
    plain(inputs())
    torch.testing.assert_close(numbers, torch.rand(3, device=DEVICE))
    assert_same_state(model, plain)


CHANGES = {
    "another weight": lambda model: setattr(model, "outer", nn.Linear(7, 3).to(DEVICE)),
    "a weight that is elsewhere": lambda model: setattr(model.outer.weight, "data", torch.ones(3, 7, device=DEVICE)),
    "another parameter in the same memory": lambda model: setattr(
        model.outer, "weight", nn.Parameter(model.outer.weight.data)
    ),
    "a frozen weight": lambda model: model.outer.weight.requires_grad_(False),
    "a setting": lambda model: setattr(model.norm, "eps", 0.5),
    "evaluation mode of a part": lambda model: model.norm.eval(),
    "another module": lambda model: setattr(model, "dropout", nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_graph_is_not_replayed_after_a_change(change):
    pair = models()
    loss_of(pair[0](inputs())).backward()
    pair[0].zero_grad()
    for model in pair:
        torch.manual_seed(1)
        change(model)
    pair[1].norm.load_state_dict(pair[0].norm.state_dict())
    for step in range(3):
        results = [model(inputs(step)) for model in pair]
        for outputs in results:
            loss_of(outputs).backward()
        torch.testing.assert_close(*results)
    assert_same_state(*pair)
    assert len(pair[0].graphs) == 2


def hook(model):
    model.inner.register_forward_hook(lambda *_: None)


def checkpointing(model):
    model.inner.gradient_checkpointing = True


@pytest.mark.parametrize(
    ("attach", "reason"),
    [
        (hook, "inner: it has hooks"),
        (checkpointing, "inner: gradient checkpointing is on"),
    ],
)
def test_module_is_called_with_a_warning_if_a_graph_would_miss_something(attach, reason, caplog):
    model, plain = models()
    for module in (model, plain):
        attach(module)
    with caplog.at_level(logging.WARNING), conddetr.record_paths() as paths:
        for step in range(2):
            replayed, outputs = replays(model, inputs(step))
            assert not replayed
            loss_of(outputs).backward()
            loss_of(plain(inputs(step))).backward()
    assert_same_state(model, plain)
    assert [record.message for record in caplog.records] == [f"CUDA graphs: {reason}: running without."]
    assert paths["graph"] == {"called without": 2}
    assert paths.reasons["graph"] == {"replay": reason}


def test_parameter_hooks_are_called_once():
    pair = models()
    for model in pair:
        model.inner.weight.register_hook(lambda grad: 2 * grad)
        model(inputs())
        loss_of(model(inputs())).backward()
    assert_same_state(*pair)


@pytest.mark.skipif(null_gpu.IS_RUNNING, reason="processes exchange zeros on a null GPU, and DDP compares sizes")
def test_distributed_data_parallel_gets_the_gradients_once():
    pair = models()
    store = dist.HashStore()
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        for model in pair:
            parallel = DistributedDataParallel(model, find_unused_parameters=True)
            for step in range(3):
                parallel.zero_grad()
                loss_of(parallel(inputs(step))).backward()
    finally:
        dist.destroy_process_group()
    assert_same_state(*pair)
    assert len(pair[0].graphs) == 1


class SharedReference(Model):
    """Uses a weight through a separate reference."""

    def compute(self, x, scale=None):
        return {"out": x @ self.places[0].T, "more": [self.inner(x)]}


def test_parameter_with_another_reference_keeps_its_gradient(caplog):
    pair = models()
    for model in pair:
        model.__class__ = SharedReference
        model.places = [model.inner.weight]
        for _ in range(2):
            loss_of(model(inputs())).backward()
    assert_same_state(*pair)
    assert "a parameter is also used through another reference" in caplog.text


def test_outputs_before_their_backward_pass_are_not_overwritten():
    """Two calls, then both backward passes: the second call is not a replay."""
    pair = models()
    pair[0](inputs())
    pair[1](inputs())
    for model in pair:
        first, second = model(inputs(1)), model(inputs(2))
        (loss_of(first) + loss_of(second)).backward()
        first, second = None, None
    assert_same_state(*pair)
    assert replays(pair[0], inputs())[0]


def test_second_backward_pass_is_an_error():
    model, _ = models()
    model(inputs())
    replayed, outputs = replays(model, inputs())
    assert replayed
    loss = loss_of(outputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_module_is_called_for_input_gradients_and_counters():
    model, _ = models()
    for _ in range(2):
        model(inputs())
    x = inputs().requires_grad_()
    replayed, outputs = replays(model, x)
    loss_of(outputs).backward()
    assert not replayed
    assert x.grad is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs())
    assert counter.get_total_flops() == 2 * 4 * (5 * 7 + 7 * 3)


def test_number_of_recorded_kinds_is_limited(monkeypatch, caplog):
    monkeypatch.setattr(graphed, "MAX_GRAPHS", 2)
    model, plain = models()
    for rows in (2, 3, 4, 5, 2):
        torch.testing.assert_close(model(inputs(rows=rows)), plain(inputs(rows=rows)))
    assert len(model.graphs) == 2
    assert [record.message for record in caplog.records] == [
        "CUDA graphs: 2 kinds of inputs and settings are recorded (pad images to fewer shapes): running without."
    ]


def test_module_is_called_if_memory_is_short_for_recording(caplog):
    def fail(run):
        raise torch.OutOfMemoryError("no more")

    model, plain = models()
    model.graphs = Graphs(lambda _: fail)
    for _ in range(2):
        torch.testing.assert_close(model(inputs()), plain(inputs()))
    assert model.graphs.refused == "the memory does not suffice for recording"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_hold_no_graphs(how):
    model, _ = models()
    model.graphs = Graphs()
    model.graphs._recorded["something"] = lambda: None
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert isinstance(copied.graphs, Graphs)
    assert len(copied.graphs) == 0


def test_cuda_graphs_are_not_used_on_a_cpu(caplog):
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    model.graphs = Graphs()
    x = torch.ones(2, 5)
    torch.testing.assert_close(model(x), plain(x))
    assert "graphs need an NVIDIA GPU, the inputs are on cpu" in caplog.text
