"""Backends of a model's parts: as the line at the start of a run announces them, and as they are recorded."""

import torch

import conddetr
from conddetr.config.run import TrainConfig
from conddetr.data.batch import collate
from conddetr.engine.chosen import PYTORCH, chosen
from conddetr.engine.precision import autocast, for_inference
from conddetr.engine.step import Stepper
from conddetr.kernels.paths import Paths

SMALL = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 20, "num_classes": 4}


def announced_and_recorded(
    preset: str, device: str, precision: str, *, trains: bool, **options: object
) -> tuple[dict[str, str], dict[str, str]]:
    """Part of a run → its backend, as announced and as recorded.

    Runs a training step, or an image through a model and its frozen copy. `options` are the model's.
    """
    target_device = torch.device(device)
    torch.manual_seed(0)
    model = conddetr.build(preset, **{**SMALL, **options}).to(target_device)
    announced = chosen(model.config, model.backend, target_device, precision, trains=trains)
    with conddetr.record_paths() as paths:
        _train(model, target_device, precision) if trains else _predict(model, target_device, precision)
    return {name: part.by for name, part in announced.parts.items()}, _by_part(
        paths, target_device, model.config.family, trains
    )


def _train(model: conddetr.DETR, device: torch.device, precision: str) -> None:
    samples = [
        (
            torch.full((3, 64 - 8 * number, 64), 90, dtype=torch.uint8),
            {
                "labels": torch.arange(3),
                "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.2, 0.3, 0.1, 0.2], [0.7, 0.6, 0.2, 0.2]]),
                "image_id": number,
                "original_size": (64, 64),
            },
        )
        for number in range(2)
    ]
    batch = collate(samples)
    config = TrainConfig(max_targets=8, cuda_graphs="off", precision=precision)
    stepper = Stepper(model.train(), config, device, steps_per_epoch=9)
    stepper([batch.pin_memory() if device.type == "cuda" else batch], 0)
    stepper.flush()


def _predict(model: conddetr.DETR, device: torch.device, precision: str) -> None:
    images = torch.zeros(1, 3, 64, 96, device=device)
    model.eval()
    for variant in (model, for_inference(model, precision)):
        with torch.inference_mode(), autocast(variant, precision):
            variant(images)


def _by_part(paths: Paths, device: torch.device, family: str, trains: bool) -> dict[str, str]:
    backends = {"attention": _only(paths.get("conditional_attention", {"eager": 1}))}
    if trains:
        backends["matching"] = _only(paths["linear_assignment"])
        backends["loss"] = _only(paths["matched_box_loss" if family == "detr" else "focal_loss"])
    ours = {"native"} if device.type == "cpu" else {"triton", "cuDNN, fused"}
    name = "native" if device.type == "cpu" else "channels-last"
    backends["backbone"] = name if ours & set(paths.get("convolution", {})) else PYTORCH
    return backends


def _only(counts: dict[str, int]) -> str:
    [name] = counts
    return PYTORCH if name == "eager" else name
