"""What `auto` picks, and what an explicit request says where it can not be met."""

import pytest
import torch

from conddetr.kernels import native, registry

CPU = torch.device("cpu")


def test_auto_on_a_cpu_is_native_where_built_and_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if native.NOT_LOADED is None:
        choice = registry.choose("auto", CPU, torch.float32)
        assert choice.backend == "native"
        assert "run on NVIDIA GPUs, the tensors are on cpu" in choice.refused["triton"]
        choice = registry.choose("auto", CPU, torch.float16)
        assert choice.backend == "eager"
        assert "on cpu its kernels take float32, bfloat16, float64, not float16" in choice.refused["native"]
        choice = registry.choose("auto", CPU, torch.float64)
        assert choice.backend == "eager"
        assert "ask for it by name" in choice.refused["native"]
        assert registry.choose("native", CPU, torch.float64).backend == "native"
    monkeypatch.setattr(native, "NOT_LOADED", "the native kernels are not built.")
    choice = registry.choose("auto", CPU, torch.float32)
    assert choice.backend == "eager"
    assert choice.refused["native"] == "the native kernels are not built."


def test_the_interpreter_must_be_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "ask for it by name" in registry.choose("auto", CPU, torch.float32).refused["triton"]
    assert registry.choose("triton", CPU, torch.float32).backend == "triton"


def test_explicit_requests_that_can_not_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' can not run here: its kernels run on NVIDIA GPUs"):
        registry.choose("triton", CPU, torch.float32)
    monkeypatch.setattr(registry, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        registry.choose("triton", CPU, torch.float32)
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, native, eager, got 'cuda'"):
        registry.choose("cuda", CPU, torch.float32)


def test_a_backend_that_the_operation_has_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice = registry.choose("auto", CPU, torch.float32, ("eager",))
    assert choice.backend == "eager"
    assert choice.refused["triton"] == "this operation has no such kernels."
    with pytest.raises(RuntimeError, match="backend 'triton' can not run here: this operation has no such kernels"):
        registry.choose("triton", CPU, torch.float32, ("eager",))
