"""What takes seconds and is not tested here is left out."""

import argparse

import pytest
import torch

from harness import rates


@pytest.fixture
def options():
    """Of the command line."""
    return argparse.Namespace(rounds=3, cudagraph=False)


@pytest.fixture
def known_rates(monkeypatch):
    """The machine is not measured, and nothing is interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(rates, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(rates, "product_rate", lambda dtype: 1e12)


@pytest.fixture
def quick(known_rates, monkeypatch):
    """Nothing is compiled either."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
