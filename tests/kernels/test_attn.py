"""Conditional attention: the plain reference against a loop written from the paper."""

import math

import pytest
import torch

from conddetr.kernels import conditional_attention


def make(batch=2, queries=3, keys=5, heads=2, content=4, spatial=6, values=3, dtype=torch.float64):
    shapes = [(queries, content), (queries, spatial), (keys, content), (keys, spatial), (keys, values)]
    return [torch.randn(batch, n, heads, d, dtype=dtype, requires_grad=True) for n, d in shapes]


def loop(q_content, q_spatial, k_content, k_spatial, v, padding, scale):
    """One weight at a time: softmax over the valid keys of the sum of two products."""
    batch, queries, heads, _ = q_content.shape
    out = torch.zeros(batch, queries, heads, v.shape[-1], dtype=v.dtype)
    for b in range(batch):
        valid = [n for n in range(v.shape[1]) if not padding[b, n]]
        for q in range(queries):
            for h in range(heads):
                scores = [
                    scale * float(q_content[b, q, h] @ k_content[b, n, h] + q_spatial[b, q, h] @ k_spatial[b, n, h])
                    for n in valid
                ]
                total = sum(math.exp(score) for score in scores)
                for n, score in zip(valid, scores, strict=True):
                    out[b, q, h] += math.exp(score) / total * v[b, n, h]
    return out


@pytest.mark.parametrize("scale", [None, 0.3])
def test_against_a_loop(scale):
    parts = make()
    padding = torch.tensor([[False] * 5, [False, True, False, True, True]])
    expected = loop(*[part.detach() for part in parts], padding, scale or 10**-0.5)
    out = conditional_attention(*parts, key_padding_mask=padding, scale=scale)
    torch.testing.assert_close(out.detach(), expected, atol=1e-12, rtol=1e-12)


def test_gradients():
    padding = torch.tensor([[False] * 5, [False, True, False, True, True]])
    assert torch.autograd.gradcheck(lambda *parts: conditional_attention(*parts, key_padding_mask=padding), make())


def test_image_without_a_valid_key_gives_zeros_and_zero_gradients():
    parts = make(batch=2)
    padding = torch.tensor([[True] * 5, [False] * 5])
    out = conditional_attention(*parts, key_padding_mask=padding)
    out.square().sum().backward()
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()
    for part in parts:
        assert (part.grad[0] == 0).all()
        assert torch.isfinite(part.grad).all()


def test_dropout_drops_weights_and_keeps_the_mean():
    parts = [part.detach() for part in make(batch=1, queries=500, keys=8, values=8)]
    parts[-1] = torch.eye(8, dtype=torch.float64).view(1, 8, 1, 8).expand(1, 8, 2, 8)  # output = weights
    kept = conditional_attention(*parts)
    dropped = conditional_attention(*parts, dropout_p=0.25)
    survived = dropped != 0
    assert survived.double().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(dropped[survived], kept[survived] / 0.75)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (1, (2, 4, 2, 6), r"q_spatial: expected shape \(2, 3, 2, 6\), got \(2, 4, 2, 6\)"),
        (2, (2, 5, 2, 5), r"k_content: expected shape \(2, 5, 2, 4\), got \(2, 5, 2, 5\)"),
        (3, (2, 6, 2, 6), r"k_spatial: expected shape \(2, 5, 2, 6\), got \(2, 6, 2, 6\)"),
        (4, (2, 5, 1, 3), r"v: expected shape \(2, 5, 2, 3\), got \(2, 5, 1, 3\)"),
    ],
)
def test_wrong_shapes_are_named(index, shape, message):
    parts = make()
    parts[index] = torch.randn(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        conditional_attention(*parts)


def test_wrong_dtype_mask_and_dropout_are_named():
    parts = make()
    with pytest.raises(ValueError, match=r"v: expected dtype torch.float64 as of q_content, got torch.float32"):
        conditional_attention(*parts[:4], parts[4].float())
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(2, 5\), got \(2, 4\)"):
        conditional_attention(*parts, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"key_padding_mask: expected dtype torch.bool, got torch.float32"):
        conditional_attention(*parts, key_padding_mask=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"dropout_p: expected a value in \[0, 1\), got 1.0"):
        conditional_attention(*parts, dropout_p=1.0)
