"""Decoding on a GPU, host side: it waits only for its own stream, and recorded steps take its batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from conddetr.config import resolve
from conddetr.config.augment import AugmentConfig
from conddetr.data import device_decoder
from conddetr.data.coco import coco_split
from conddetr.data.device_decoder import DeviceDecoder
from conddetr.data.loader import make_loader
from conddetr.data.transforms import TrainTransform
from null_gpu.counts import counted
from null_gpu.test_training import make_stepper


@pytest.fixture
def loader(small_coco, monkeypatch):
    """Batches of four files that workers read; memory without content stands for what nvJPEG decodes."""
    for index in range(4):
        pixels = np.zeros((60 + 10 * index, 90, 3), np.uint8)
        Image.fromarray(pixels).save(small_coco.images / f"{index}.jpg")
    decode = device_decoder.decode_jpeg
    monkeypatch.setattr(
        device_decoder,
        "decode_jpeg",
        lambda contents, mode, device: [
            torch.empty_like(pixels, device=device) for pixels in decode(contents, mode, "cpu")
        ],
    )
    transform = TrainTransform(resolve("conditional-detr-tiny"), AugmentConfig("strong", mosaic=0.5))
    dataset = coco_split(small_coco.root, "train", transform)
    return make_loader(dataset, 4, train=True, pad_buckets=1, decoder=DeviceDecoder(torch.device("cuda")))


def test_decoding_waits_for_nothing_but_its_last_batch(loader):
    encoded = [loader.dataset[plan] for plan in loader.sampler]
    loader.decoder(encoded[0])
    with counted() as counts:
        batch = loader.decoder(encoded[0])
    assert counts.waits == 1
    assert batch.images.is_cuda
    assert batch.sizes.is_pinned()
    assert batch.labels.device.type == "cpu"


def test_recorded_steps_take_decoded_batches(loader):
    stepper = make_stepper(cuda_graphs="on")
    with counted() as counts:
        for step in range(3):
            loader.sampler.set_epoch(step)
            for batch in loader:
                stepper([batch], step)
    assert counts.graph_launches == 3
    assert counts.refused_in_capture == 0
