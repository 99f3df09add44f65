"""What a model computes with, as the line at the start of a run says it, and as it is recorded."""

import torch

import conddetr
from conddetr.config.run import TrainConfig
from conddetr.data.batch import collate
from conddetr.engine.chosen import PYTORCH, chosen
from conddetr.engine.precision import autocast, for_inference
from conddetr.engine.step import Stepper
from conddetr.kernels.paths import Paths

SMALL = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 20, "num_classes": 4}


def said_and_ran(
    preset: str, device: str, precision: str, *, trains: bool, **options: object
) -> tuple[dict[str, str], dict[str, str]]:
    """Part of a run -> by what, twice: a step of a training, or an image through a model and its frozen copy.

    `options` are those of the model.
    """
    place = torch.device(device)
    torch.manual_seed(0)
    model = conddetr.build(preset, **{**SMALL, **options}).to(place)
    said = chosen(model.config, model.backend, place, precision, trains=trains)
    with conddetr.record_paths() as paths:
        _train(model, place, precision) if trains else _predict(model, place, precision)
    return {name: part.by for name, part in said.parts.items()}, _by_part(paths, place, model.config.family, trains)


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
    for called in (model, for_inference(model, precision)):
        with torch.inference_mode(), autocast(called, precision):
            called(images)


def _by_part(paths: Paths, device: torch.device, family: str, trains: bool) -> dict[str, str]:
    found = {"attention": _only(paths.get("conditional_attention", {"eager": 1}))}
    if trains:
        found["matching"] = _only(paths["linear_assignment"])
        found["loss"] = _only(paths["matched_box_loss" if family == "detr" else "focal_loss"])
    ours = {"native"} if device.type == "cpu" else {"triton", "cuDNN, fused"}
    name = "native" if device.type == "cpu" else "channels-last"
    found["backbone"] = name if ours & set(paths.get("convolution", {})) else PYTORCH
    return found


def _only(counts: dict[str, int]) -> str:
    [name] = counts
    return PYTORCH if name == "eager" else name
