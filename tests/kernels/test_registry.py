"""The choices of `auto`, and the errors of explicit requests that cannot be met."""

import dataclasses

import pytest
import torch

from conddetr import kernels
from conddetr.kernels import native, records, registry
from conddetr.kernels.records import Record, Verdict

CPU = torch.device("cpu")


@pytest.fixture
def operation() -> registry.Operation:
    """An operation that is in no table."""
    return registry.Operation("anything", {"triton": registry.Kernels(), "native": registry.Kernels()})


def test_auto_on_a_cpu_is_native_if_built_and_gives_reasons(operation, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if native.NOT_LOADED is None:
        choice = operation.choose("auto", CPU, torch.float32)
        assert choice.backend == "native"
        assert "run on NVIDIA GPUs, but the tensors are on cpu" in choice.refused["triton"]
        choice = operation.choose("auto", CPU, torch.float16)
        assert choice.backend == "eager"
        assert "on cpu its kernels take float32, bfloat16, float64, not float16" in choice.refused["native"]
        choice = operation.choose("auto", CPU, torch.float64)
        assert choice.backend == "eager"
        assert "request this backend by name" in choice.refused["native"]
        assert operation.choose("native", CPU, torch.float64).backend == "native"
    monkeypatch.setattr(native, "NOT_LOADED", "the native kernels are not built.")
    choice = operation.choose("auto", CPU, torch.float32)
    assert choice.backend == "eager"
    assert choice.refused["native"] == "the native kernels are not built."


def test_interpreter_must_be_requested(operation, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "request it by name" in operation.choose("auto", CPU, torch.float32).refused["triton"]
    assert operation.choose("triton", CPU, torch.float32).backend == "triton"


def test_explicit_requests_that_cannot_run_raise(operation, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: its kernels run on NVIDIA GPUs"):
        operation.choose("triton", CPU, torch.float32)
    monkeypatch.setattr(registry, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        operation.choose("triton", CPU, torch.float32)
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, native, eager, got 'cuda'"):
        operation.choose("cuda", CPU, torch.float32)


def test_backend_that_the_operation_lacks(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plain = registry.Operation("plain", {})
    assert plain.choose("auto", CPU, torch.float32) == registry.Choice("eager", {})
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: this operation has no kernels of"):
        plain.choose("triton", CPU, torch.float32)
    assert plain.prefer("triton", CPU, torch.float32).backend == "eager"
    with pytest.raises(ValueError, match="backend: expected one of auto"):
        plain.prefer("cuda", CPU, torch.float32)


def test_declarations_of_kernels_are_checked_in_turn(operation, monkeypatch):
    """Device, dtype, dtypes of `auto`, inputs. A preference falls back, a demand raises an error."""
    monkeypatch.setattr(registry, "why_not", lambda *_, **__: None)

    def reason(**declared: object) -> str:
        kernels = dataclasses.replace(registry.Kernels(), **declared)
        changed = dataclasses.replace(operation, kernels={"native": kernels})
        choice = changed.choose("auto", CPU, torch.float32, 7)
        assert (choice.backend == "eager") == bool(choice.refused)
        demand = changed.why_not("native", CPU, torch.float32, 7)
        if demand is not None:
            assert demand == choice.refused["native"]
            assert changed.prefer("native", CPU, torch.float32, 7) == choice
            with pytest.raises(registry.BackendError, match="backend 'native' cannot run here"):
                changed.choose("native", CPU, torch.float32, 7)
        return f"{'demand' if demand else 'auto'}: {choice.refused.get('native')}"

    assert reason() == "auto: None"
    assert reason(devices=("cuda",)) == "demand: its kernels run on GPUs, but the tensors are on cpu."
    assert reason(dtypes=(torch.bfloat16,)) == "demand: its kernels take bfloat16, not float32."
    assert reason(auto_dtypes=(torch.bfloat16,)).startswith("auto: in float32 `auto` uses plain PyTorch")
    assert reason(why_not=lambda width: f"width {width}") == "demand: width 7"
    assert reason(why_not_auto=lambda width: f"width {width}") == "auto: width 7"


def test_auto_on_a_gpu_chooses_checked_kernels(operation, monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(registry, "why_not", lambda *_, **__: None)
    good = Verdict("anything", "native", "float32", "", 0.5, 2.0)
    slow = Verdict("anything", "triton", "float32", "it is slower than PyTorch.", 0.5, 0.5)
    record = Record({}, (good, slow), False, "2026-11-29", {})
    with records.pretend(record):
        assert operation.choose("auto", gpu, torch.float32) == registry.Choice("native", {"triton": slow.refused})
        assert operation.choose("auto", gpu, torch.bfloat16).backend == "eager"
    with records.pretend(None):
        choice = operation.choose("auto", gpu, torch.float32)
        assert choice.backend == "eager"
        assert "`conddetr check`" in choice.refused["native"]
        assert operation.choose("native", gpu, torch.float32).backend == "native"
        assert operation.choose("auto", CPU, torch.float32).backend == "triton"
        with registry.demanded("triton"):
            assert operation.choose("auto", gpu, torch.float32).backend == "triton"
            with registry.demanded("auto"):
                assert operation.choose("auto", gpu, torch.float32).backend == "triton"
        with registry.demanded("auto"):
            assert operation.choose("auto", gpu, torch.float32).backend == "eager"


def test_capability_is_that_of_the_current_gpu(monkeypatch):
    """It is cached for a GPU with an index; without an index it changes after `set_device`."""
    capabilities = iter([(8, 0), (9, 0)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: next(capabilities))
    assert [registry.capability(torch.device("cuda")) for _ in range(2)] == [(8, 0), (9, 0)]


def test_every_public_function_with_kernels_is_in_the_table():
    """Except convolution_pair, which consists of convolutions, drawn_probability, which runs no kernel, and check."""
    functions = set(kernels.__all__) - {"check", "convolution_pair", "drawn_probability"}
    assert set(registry.OPERATIONS) == functions | {"self_attention"}
    assert all(operation.name == name for name, operation in registry.OPERATIONS.items())
