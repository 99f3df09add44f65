"""The transformer: projections of all layers at once, and which of PyTorch's attention kernels run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import conddetr
from conddetr.kernels import native
from conddetr.kernels.attn import dense_spatial_keys, rectangle_padding
from conddetr.model.attention import self_attention
from conddetr.model.families.conditional_detr.keys import project_all_keys
from conddetr.model.position import sine_position_encoding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Operators(TorchDispatchMode):
    """Records the names of attention operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if "scaled_dot_product" in name:
            self.names.append(name.removeprefix("_scaled_dot_product_"))
        return function(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.parametrize("is_padded", [False, True])
def test_self_attention_runs_a_fused_kernel(is_padded):
    """Two encoder and two decoder layers; only the `math` kernel would write all N × N weights."""
    model = conddetr.build("conditional-detr-tiny", backend="eager").to(DEVICE)
    # On CPUs attention with dropout has no fused kernel.
    model.train(DEVICE == "cuda")
    sizes = [(64, 96), (96, 64)] if is_padded else [(64, 96)] * 2
    with torch.no_grad(), Operators() as operators:
        model([torch.randn(3, *size, device=DEVICE) for size in sizes])
    fused = {"cpu": {"flash_attention_for_cpu"}, "cuda": {"flash_attention", "efficient_attention", "cudnn_attention"}}
    assert len(operators.names) == 4
    assert set(operators.names) <= fused[DEVICE], operators.names


@pytest.mark.parametrize("width", [8, 7, 32])
@pytest.mark.parametrize("is_padded", [False, True])
def test_native_self_attention_equals_pytorchs(is_padded, width):
    if native.NOT_LOADED:
        pytest.skip(native.NOT_LOADED)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 11, 4 * width, generator=generator, dtype=torch.float64) for _ in range(4)]
    *leaves, upstream = tensors
    leaves = [leaf.requires_grad_() for leaf in leaves]
    padding = torch.arange(11) >= torch.tensor([[11], [6]]) if is_padded else None
    with Operators() as operators:
        outputs = [self_attention(*leaves, 4, padding, 0.0, backend) for backend in ("eager", "native")]
    assert len(operators.names) == 1
    torch.testing.assert_close(outputs[1], outputs[0])
    for expected, ours in zip(*(torch.autograd.grad(y, leaves, upstream) for y in outputs), strict=True):
        torch.testing.assert_close(ours, expected)


def test_keys_of_all_layers_equal_those_of_each_layer():
    """Separable keys from two products equal the dense keys of each layer wherever a key is valid."""
    decoder = conddetr.build("conditional-detr-tiny", decoder_layers=3).double().transformer.decoder
    size, valid_cells = (4, 7), torch.tensor([[4, 5], [3, 7]])
    padding = rectangle_padding(valid_cells, *size)
    position = sine_position_encoding(padding.unflatten(1, size), 64).double()
    memory = torch.randn(2, 28, 64, dtype=torch.float64)
    together = project_all_keys(decoder.layers, memory, position, size)
    assert len(together) == 3
    for layer, keys in zip(decoder.layers, together, strict=True):
        alone = layer.project_keys(memory, position)
        torch.testing.assert_close(keys.content, alone.content)
        torch.testing.assert_close(keys.value, alone.value)
        torch.testing.assert_close(dense_spatial_keys(*keys.spatial)[~padding], alone.spatial[~padding])


def test_without_padding_the_batch_shares_one_encoding():
    decoder = conddetr.build("conditional-detr-tiny").transformer.decoder
    position = sine_position_encoding(torch.zeros(1, 3, 5, dtype=torch.bool), 64)
    memory = torch.randn(4, 15, 64)
    together = project_all_keys(decoder.layers, memory, position, (3, 5))
    expected = decoder.layers[1].project_keys(memory, position).spatial
    torch.testing.assert_close(dense_spatial_keys(*together[1].spatial), expected, atol=1e-5, rtol=1e-5)
