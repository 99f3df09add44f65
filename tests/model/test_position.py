"""Position encoding, mask resize and inverse sigmoid against the official numbers."""

import pytest
import torch
from golden_rule import read_arrays, read_json

from conddetr.model.detr import inverse_sigmoid, pad_images, resize_mask
from conddetr.model.position import sine_position_encoding


@pytest.mark.parametrize(
    ("key", "dim", "normalize"),
    [("sine_n128_normalized", 256, True), ("sine_n32_normalized", 64, True), ("sine_n16_unnormalized", 32, False)],
)
def test_official_position_encoding(key, dim, normalize):
    golden = read_arrays("p5_cdetr")
    found = sine_position_encoding(golden["pos/mask"], dim, normalize=normalize)
    expected = golden[f"pos/{key}"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("stride", [16, 32])
def test_official_mask_resize(stride):
    info = read_json("p5_cdetr")["units"]["pos"]
    _, mask = pad_images([torch.zeros(3, height, width) for height, width in info["image_sizes_for_featmask"]])
    size = tuple(-(-side // stride) for side in info["padded"])
    assert torch.equal(resize_mask(mask, size), read_arrays("p5_cdetr")[f"pos/featmask_stride{stride}"])


def test_official_inverse_sigmoid():
    golden = read_arrays("p5_cdetr")
    torch.testing.assert_close(inverse_sigmoid(golden["invsig/x"]), golden["invsig/y"], atol=1e-6, rtol=1e-6)
