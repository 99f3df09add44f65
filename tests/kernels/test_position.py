"""Positions of a grid: the kernel against the reference. tests/model compares the reference with official values."""

import math

import pytest
import torch

from conddetr.kernels import grid_positions, registry
from conddetr.kernels.position.reference import sine_position_encoding, valid_cells

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]


def exact(padding, dim):
    """The encoding of valid cells by its formula, float64."""
    valid = (~padding).double()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y, x = (2 * math.pi * a / (a.amax((1, 2), keepdim=True) + 1e-6) for a in (y, x))
    channel = torch.arange(dim // 2, device=padding.device)
    rate = 10000.0 ** (-2 * (channel // 2) / (dim // 2))
    phases = [a.unsqueeze(-1) * rate for a in (y, x)]
    return torch.cat([torch.where(channel % 2 == 0, phase.sin(), phase.cos()) for phase in phases], -1).flatten(1, 2)


@pytest.mark.parametrize("dim", [4, 36, 256])
@pytest.mark.parametrize(("image_size", "size"), [((800, 1066), (25, 34)), ((31, 33), (1, 2)), ((333, 500), (21, 32))])
def test_kernel_matches_the_reference(image_size, size, dim, device):
    parts = torch.tensor([[1.0, 1.0], [0.5, 0.9], [1.0, 0.03], [0.0, 0.4], [0.7, 0.0]], dtype=torch.float64)
    valid = (parts * torch.tensor(image_size)).to(device, torch.int32)
    features = torch.empty(5, 3, *size, device=device)
    expected = grid_positions(features, image_size, dim, valid, backend="eager")
    position, padding, cells = grid_positions(features, image_size, dim, valid, backend="triton")
    assert torch.equal(cells, expected[2])
    assert torch.equal(cells, valid_cells(valid, image_size, size))
    assert torch.equal(padding, expected[1])
    torch.testing.assert_close(position, expected[0], atol=2e-6, rtol=0)
    # The official code adds 1e-6 to the valid size.
    truth = exact(padding.unflatten(1, size), dim)
    torch.testing.assert_close(position[~padding].double(), truth[~padding], atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_without_padding_share_one_encoding(dtype, device):
    features = torch.empty(3, 7, 5, 9, device=device, dtype=dtype)
    position, padding, cells = grid_positions(features, (160, 288), 64, backend="triton")
    assert padding is None
    assert cells is None
    assert position.dtype == dtype
    unpadded = torch.zeros(1, 5, 9, dtype=torch.bool, device=device)
    expected = sine_position_encoding(unpadded, 64).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(position, expected, atol=2e-6 + eps, rtol=0)


def test_operator_registration(device):
    valid = torch.tensor([[31, 20], [9, 33]], dtype=torch.int32, device=device)
    for sizes in (valid, None):
        arguments = (torch.randn(2, 3, 4, 5, device=device), sizes, 31, 33, 16)
        torch.library.opcheck(torch.ops.conddetr.grid_positions.default, arguments)


def test_wrong_arguments_are_named(device):
    features = torch.empty(2, 3, 4, 5, device=device)
    for wrong, shape in ((features[0], r"\(3, 4, 5\)"), (features[:, :, :0], r"\(2, 3, 0, 5\)")):
        with pytest.raises(ValueError, match=rf"features: expected \[B, C, h, w\] with cells, floating, got {shape}"):
            grid_positions(wrong, (31, 33), 16)
    with pytest.raises(ValueError, match="dim: expected a multiple of 4, got 6"):
        grid_positions(features, (31, 33), 6)
    with pytest.raises(ValueError, match=r"valid_hw: expected \(2, 2\) torch.int32, got \(2, 2\) torch.int64"):
        grid_positions(features, (31, 33), 16, torch.zeros(2, 2, dtype=torch.int64, device=device))
    wide = torch.empty(1, 1, 1, 1025, device=device)
    with pytest.raises(registry.BackendError, match="at most 1024 rows and columns, got 1 × 1025"):
        grid_positions(wide, (32, 32800), 16, backend="triton")
