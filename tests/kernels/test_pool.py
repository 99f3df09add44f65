"""Max pooling without indices: exactly PyTorch's values, refused inputs, errors."""

import pytest
import torch
import torch.nn.functional as F

from conddetr.kernels import max_pool, registry

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]


def make(size=(5, 6), channels=5, dtype=torch.float32, device="cpu"):
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "channels"), [((1, 1), 5), ((2, 1), 5), ((5, 4), 5), ((3, 34), 64)])
def test_values_are_pytorchs(size, channels, dtype, device):
    """Maps of negative numbers show that padding is not zero. A row of the last map needs two blocks."""
    x = make(size, channels, dtype, device) - 3
    out = max_pool(x, backend="triton")
    assert torch.equal(out, F.max_pool2d(x, 3, 2, 1))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_nan_and_infinity_propagate(device):
    x = make(device=device)
    x[0, 1, 3, 3], x[0, 2, 0, 0] = torch.nan, torch.inf
    x[1] = -torch.inf
    out = max_pool(x, backend="triton")
    torch.testing.assert_close(out, F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0, equal_nan=True)
    assert out.isnan().sum() == 4


def test_operator_registration(device):
    torch.library.opcheck(torch.ops.conddetr.max_pool.default, (make(device=device),))


def test_gradients_are_pytorchs():
    x = make(dtype=torch.float64)
    assert torch.autograd.gradcheck(max_pool, (x.requires_grad_(),))


def test_errors():
    x = make()
    with pytest.raises(ValueError, match=r"x: expected \[B, C, H, W\] with cells, floating, got \(2, 5, 0, 6\)"):
        max_pool(x[:, :, :0])
    with pytest.raises(ValueError, match=r"floating, got \(2, 5, 5, 6\) torch\.int64"):
        max_pool(x.long())
    with pytest.raises(registry.BackendError, match="backend 'triton' cannot run here: its kernel has no gradient"):
        max_pool(x.clone(memory_format=torch.preserve_format).requires_grad_(), backend="triton")
    with pytest.raises(registry.BackendError, match="not an ordinary tensor in channels-last"):
        max_pool(x.contiguous(), backend="triton")
