"""Position encoding, mask resize and inverse sigmoid, compared with the official numbers."""

import pytest
import torch
from golden_rule import read_arrays, read_json

from conddetr.kernels.attn import rectangle_padding
from conddetr.kernels.position.reference import valid_cells
from conddetr.kernels.prediction import inverse_sigmoid
from conddetr.model.detr import pad_images, resize_mask
from conddetr.model.position import sine_position_encoding


@pytest.mark.parametrize(
    ("key", "dim", "normalize"),
    [("sine_n128_normalized", 256, True), ("sine_n32_normalized", 64, True), ("sine_n16_unnormalized", 32, False)],
)
def test_official_position_encoding(key, dim, normalize):
    golden = read_arrays("p5_cdetr")
    encoding = sine_position_encoding(golden["pos/mask"], dim, normalize=normalize)
    expected = golden[f"pos/{key}"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoding, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("stride", [16, 32])
def test_official_mask_resize(stride):
    info = read_json("p5_cdetr")["units"]["pos"]
    images = [torch.zeros(3, height, width) for height, width in info["image_sizes_for_featmask"]]
    batch, valid_hw = pad_images(images)
    expected = read_arrays("p5_cdetr")[f"pos/featmask_stride{stride}"]
    image_size, size = tuple(batch.shape[-2:]), tuple(expected.shape[1:])
    mask = rectangle_padding(valid_hw, *image_size).unflatten(1, image_size)
    assert torch.equal(resize_mask(mask, size), expected)
    assert torch.equal(rectangle_padding(valid_cells(valid_hw, image_size, size), *size).unflatten(1, size), expected)


@pytest.mark.parametrize("stride", [16, 32])
def test_valid_cells_are_the_unmasked_cells_of_the_resized_mask(stride):
    for height, width in ((800, 1066), (333, 500), (31, 33), (480, 641)):
        size = (-(-height // stride), -(-width // stride))
        valid_hw = torch.stack([torch.arange(1, 31) * height // 30, torch.arange(30, 0, -1) * width // 30], 1)
        mask = rectangle_padding(valid_hw, height, width).unflatten(1, (height, width))
        visible = ~resize_mask(mask, size)
        expected = torch.stack([visible.any(2).sum(1), visible.any(1).sum(1)], 1)
        assert torch.equal(valid_cells(valid_hw, (height, width), size).long(), expected)


def test_official_inverse_sigmoid():
    golden = read_arrays("p5_cdetr")
    torch.testing.assert_close(inverse_sigmoid(golden["invsig/x"]), golden["invsig/y"], atol=1e-6, rtol=1e-6)
