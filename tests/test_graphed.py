"""Graphs of a module: the numbers of calls, and calls where a graph would leave something out."""

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
    # Newer PyTorch says so where a recording reaches for what was computed on another stream.
    pytest.mark.filterwarnings("error:The AccumulateGrad node's stream"),
]


class Model(nn.Module):
    """Two outputs with gradients and one without, a parameter that nothing uses, and statistics."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 7), nn.Linear(7, 3)
        self.norm, self.dropout = nn.BatchNorm1d(7), nn.Dropout(0.0)
        self.unused = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.graphs = None
        self.calls = []

    def forward(self, x, scale=None):
        found = None if self.graphs is None else self.graphs(self, self.compute, (x, scale))
        return self.compute(x, scale) if found is None else found

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


def assert_same_state(found, expected):
    for (name, a), (_, b) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, a), (_, b) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def replays(model, *args):
    """How a call was computed: (was it replayed, what it returned)."""
    before = len(model.calls)
    outputs = model(*args)
    return len(model.calls) == before, outputs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_calls(accumulate):
    """Outputs, gradients, weights, statistics, for two shapes in turn; gradients may be added up."""
    pair = models()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in pair]
    for step in range(6):
        x = inputs(step, rows=4 + step % 2)
        found = []
        for model, optimizer in zip(pair, optimizers, strict=True):
            outputs = model(x, torch.full((), 1.0 + step, device=DEVICE))
            loss_of(outputs).backward()
            found.append(outputs)
            if step % accumulate == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(found[0], found[1])
        assert_same_state(*pair)
    assert len(pair[0].graphs) == 2
    assert replays(pair[0], x)[0] is False, "without the second input it is another kind, recorded first"
    assert replays(pair[0], x)[0] is True


def test_a_call_returns_memory_of_its_own():
    model, _ = models()
    first = model(inputs(1))
    loss_of(first).backward()
    kept = [tensor.clone() for tensor in tree_leaves(first)], model.inner.weight.grad, model.inner.weight.grad.clone()
    model.zero_grad()
    loss_of(model(inputs(2))).backward()
    torch.testing.assert_close(tree_leaves(first), kept[0])
    torch.testing.assert_close(kept[1], kept[2])


def test_an_output_without_a_use_has_a_gradient_of_zeros():
    """Where it is used in one step it must not be that of the step before."""
    model, plain = models()
    for step in range(3):
        for one in (model, plain):
            one.zero_grad()
            outputs = one(inputs(step))
            (outputs["out"] if step == 1 else outputs["more"][0]).sum().backward()
        for name, parameter in plain.named_parameters():
            found, expected = model.get_parameter(name).grad, parameter.grad
            if expected is None and name.startswith("outer"):
                expected = torch.zeros_like(parameter)
            assert (found is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(found, expected, msg=name)


def test_inference_is_replayed_and_its_numbers_are_those_of_calls():
    model, plain = models()
    for one in (model, plain):
        one.eval()
    with torch.inference_mode():
        model(inputs())
    for seed, mode in enumerate((torch.inference_mode, torch.no_grad)):
        with mode():
            replayed, outputs = replays(model, inputs(seed))
            torch.testing.assert_close(outputs, plain(inputs(seed)))
        assert replayed


def test_random_numbers_differ_from_replay_to_replay():
    model, _ = models()
    model.dropout.p = 0.5
    outputs = [model(inputs())["more"][0].detach() for _ in range(3)]
    assert not torch.equal(outputs[1], outputs[2])


def test_recording_changes_no_random_number_and_no_statistic():
    model, plain = models()
    torch.manual_seed(7)
    model(inputs())
    found = torch.rand(3, device=DEVICE)
    torch.manual_seed(7)
    plain(inputs())
    torch.testing.assert_close(found, torch.rand(3, device=DEVICE))
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
def test_what_was_recorded_is_not_replayed_after(change):
    pair = models()
    loss_of(pair[0](inputs())).backward()
    pair[0].zero_grad()
    for model in pair:
        torch.manual_seed(1)
        change(model)
    pair[1].norm.load_state_dict(pair[0].norm.state_dict())
    for step in range(3):
        found = [model(inputs(step)) for model in pair]
        for outputs in found:
            loss_of(outputs).backward()
        torch.testing.assert_close(*found)
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
def test_it_is_called_and_said_where_a_graph_would_leave_something_out(attach, reason, caplog):
    model, plain = models()
    for one in (model, plain):
        attach(one)
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


def test_hooks_of_parameters_are_called_once():
    pair = models()
    for model in pair:
        model.inner.weight.register_hook(lambda grad: 2 * grad)
        model(inputs())
        loss_of(model(inputs())).backward()
    assert_same_state(*pair)


@pytest.mark.skipif(null_gpu.IS_RUNNING, reason="processes exchange zeros on a null GPU, and DDP compares sizes")
def test_data_parallelism_gets_the_gradients_once():
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


class Sideways(Model):
    """Reads a weight by a reference of its own."""

    def compute(self, x, scale=None):
        return {"out": x @ self.places[0].T, "more": [self.inner(x)]}


def test_a_parameter_that_is_used_from_elsewhere_keeps_its_gradient(caplog):
    pair = models()
    for model in pair:
        model.__class__ = Sideways
        model.places = [model.inner.weight]
        for _ in range(2):
            loss_of(model(inputs())).backward()
    assert_same_state(*pair)
    assert "a parameter is also used through another reference" in caplog.text


def test_what_waits_for_its_backward_pass_is_not_overwritten():
    """Two calls, then both backward passes: the second call is no replay."""
    pair = models()
    pair[0](inputs())
    pair[1](inputs())
    for model in pair:
        first, second = model(inputs(1)), model(inputs(2))
        (loss_of(first) + loss_of(second)).backward()
        first, second = None, None
    assert_same_state(*pair)
    assert replays(pair[0], inputs())[0]


def test_a_second_backward_pass_is_an_error():
    model, _ = models()
    model(inputs())
    replayed, outputs = replays(model, inputs())
    assert replayed
    loss = loss_of(outputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_gradients_of_inputs_and_counters_need_calls():
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


def test_only_so_many_kinds(monkeypatch, caplog):
    monkeypatch.setattr(graphed, "MAX_GRAPHS", 2)
    model, plain = models()
    for rows in (2, 3, 4, 5, 2):
        torch.testing.assert_close(model(inputs(rows=rows)), plain(inputs(rows=rows)))
    assert len(model.graphs) == 2
    assert [record.message for record in caplog.records] == [
        "CUDA graphs: 2 kinds of inputs and settings are recorded (pad images to fewer shapes): running without."
    ]


def test_without_memory_it_goes_on_without(caplog):
    def fail(run):
        raise torch.OutOfMemoryError("no more")

    model, plain = models()
    model.graphs = Graphs(lambda _: fail)
    for _ in range(2):
        torch.testing.assert_close(model(inputs()), plain(inputs()))
    assert model.graphs.refused == "the memory does not suffice for recording"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_record_anew(how):
    model, _ = models()
    model.graphs = Graphs()
    model.graphs._recorded["something"] = lambda: None
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert isinstance(copied.graphs, Graphs)
    assert len(copied.graphs) == 0


def test_graphs_of_a_gpu_are_not_tried_elsewhere(caplog):
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    model.graphs = Graphs()
    x = torch.ones(2, 5)
    torch.testing.assert_close(model(x), plain(x))
    assert "graphs need an NVIDIA GPU, the inputs are on cpu" in caplog.text
