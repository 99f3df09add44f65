"""Fixtures that leave out slow steps that are not tested here."""

import argparse

import pytest
import torch

from harness import rates


@pytest.fixture
def options():
    """Command-line options of a short run."""
    return argparse.Namespace(rounds=3, cudagraph=False)


@pytest.fixture
def known_rates(monkeypatch):
    """Fixed rates instead of measured ones, and no Triton interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(rates, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(rates, "product_rate", lambda dtype: 1e12)


@pytest.fixture
def quick(known_rates, monkeypatch):
    """`known_rates`, and no compilation."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
