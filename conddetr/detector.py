"""A trained detector, ready to use: weights, class names and preprocessing in one object."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conddetr import config as configs
from conddetr.engine.checkpoint import read_checkpoint
from conddetr.interop.official import extract_state_dict, identify, load_weights
from conddetr.model.detr import DETR
from conddetr.model.postprocess import postprocess

if TYPE_CHECKING:
    from conddetr.data.images import ImageLike


@dataclass
class Detection:
    """The objects found in one image, best first."""

    scores: Tensor
    """[n] float32 in [0, 1]."""
    labels: Tensor
    """[n] int64, index into the detector's `classes`."""
    boxes: Tensor
    """[n, 4] float32 xyxy in pixels of the image as given."""
    names: list[str]
    """Class name of each object."""

    def __len__(self) -> int:
        return len(self.names)


class Detector:
    """A model with its class list; from `Detector.from_checkpoint`."""

    def __init__(self, model: DETR, classes: Sequence[dict[str, Any]], device: str | None = None) -> None:
        """
        Args:
            model: any preset.
            classes: `id` (category id of the data set) and `name` of every label.
            device: as torch names it; default CUDA where there is one.

        Raises:
            ValueError: the number of classes is not the model's.
        """
        if len(classes) != model.config.num_classes:
            raise ValueError(f"classes: expected {model.config.num_classes} as the model has, got {len(classes)}.")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.classes = list(classes)

    @classmethod
    def from_checkpoint(cls, path: str | Path, preset: str | None = None, device: str | None = None) -> "Detector":
        """Load a checkpoint of ours, or an official one of Conditional DETR or DETR.

        Args:
            path: the file.
            preset: for official checkpoints: the preset they belong to. Default: found from the weights and
                the arguments stored with them.
            device: as torch names it; default CUDA where there is one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or the weights do not fit; says what was found and what was expected.
        """
        content = read_checkpoint(path)
        if "config" in content and "classes" in content:
            config, classes = configs.from_dict(content["config"]), content["classes"]
        else:
            config = _official_config(content, preset, path)
            classes = _official_classes(config.num_classes)
        model = DETR(configs.from_dict({**config.to_dict(), "pretrained_backbone": False}))
        load_weights(model, content)
        return cls(model, classes, device)

    @torch.inference_mode()
    def predict(
        self,
        images: "ImageLike | Sequence[ImageLike]",
        threshold: float = 0.5,
        top_k: int = 100,
    ) -> list[Detection]:
        """Find objects.

        Args:
            images: one image or a list: file, PIL image, array [H, W] or [H, W, 3], tensor [3, H, W]; see
                `conddetr.data.images.read_image`. They may differ in size and run one by one.
            threshold: keep scores of at least this.
            top_k: keep at most so many per image.

        Returns:
            One `Detection` per image, always in a list.

        Raises:
            FileNotFoundError, ValueError, TypeError: an image can not be read; names the file, or what was
                found and what was expected.
        """
        # Here, not above: torchvision's transforms take 0.17 s to import, `import conddetr` without them 0.02 s.
        from conddetr.data.images import read_image

        if not isinstance(images, (list, tuple)):
            images = [images]
        return [self._predict_one(read_image(image), threshold, top_k) for image in images]

    def _predict_one(self, image: Tensor, threshold: float, top_k: int) -> Detection:
        from conddetr.data.images import prepare

        config = self.model.config
        pixels = prepare(image.to(self.device), config.image_size, config.max_image_size)
        found = postprocess(self.model([pixels]), [tuple(image.shape[-2:])], top_k, config.activation)[0]
        keep = found["scores"] >= threshold
        scores, labels, boxes = (found[key][keep].cpu() for key in ("scores", "labels", "boxes"))
        return Detection(scores, labels, boxes, [self.classes[label]["name"] for label in labels.tolist()])


def _official_config(content: dict, preset: str | None, path: str | Path) -> configs.ModelConfig:
    """The configuration of an official checkpoint, from its weights and stored arguments."""
    found = identify(extract_state_dict(content))
    if not found:
        raise ValueError(f"Checkpoint {path}: the weights are neither Conditional DETR's nor DETR's.")
    if preset is None:
        arguments = content.get("args", argparse.Namespace())
        dilated = "dc5-" if getattr(arguments, "dilation", False) else ""
        preset = f"{found['family']}-{dilated}{str(found['backbone']).replace('resnet', 'r')}"
    return configs.resolve(preset, num_classes=found["num_classes"], num_queries=found["num_queries"])


def _official_classes(num_classes: int) -> list[dict[str, Any]]:
    """Official models use COCO's category ids themselves as labels; other class lists have no names."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if num_classes != len(names):
        names = [str(label) for label in range(num_classes)]
    return [{"id": label, "name": name} for label, name in enumerate(names)]
