"""Fine-tune transformers' Conditional DETR with its own image processor and Trainer, and one line of conddetr.

    python docs/examples/finetune_huggingface.py COCO_FOLDER                       # a tiny model with random weights
    python docs/examples/finetune_huggingface.py COCO_FOLDER --checkpoint microsoft/conditional-detr-resnet-50

The folder is in COCO's 2017 layout: `train2017/*.jpg` and `annotations/instances_train2017.json`.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    ResNetConfig,
    Trainer,
    TrainingArguments,
)

import conddetr


class CocoImages(Dataset):
    """Images with annotations; transformers' image processor makes batches of them."""

    def __init__(self, folder: Path, processor: ConditionalDetrImageProcessor) -> None:
        content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
        self.folder, self.processor, self.images = folder / "train2017", processor, content["images"]
        self.num_labels = max(category["id"] for category in content["categories"]) + 1
        self.annotations = {image["id"]: [] for image in self.images}
        for annotation in content["annotations"]:
            self.annotations[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        info = self.images[index]
        image = Image.open(self.folder / info["file_name"]).convert("RGB")
        return {"images": image, "annotations": {"image_id": info["id"], "annotations": self.annotations[info["id"]]}}

    def collate(self, items: list[dict]) -> dict:
        """Resized, normalised and padded to one batch: `pixel_values`, `pixel_mask`, `labels`."""
        columns = {name: [item[name] for item in items] for name in ("images", "annotations")}
        return dict(self.processor(**columns, return_tensors="pt"))


def tiny_model(num_labels: int) -> ConditionalDetrForObjectDetection:
    """Random weights, small enough for a CPU."""
    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    config = ConditionalDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        encoder_layers=2,
        decoder_layers=6,
        num_queries=100,
        num_labels=num_labels,
        auxiliary_loss=True,
        **heads,
        **widths,
    )
    model = ConditionalDetrForObjectDetection(config)
    # Every class starts at probability 0.01, as in the paper; transformers leaves that out.
    torch.nn.init.constant_(model.class_labels_classifier.bias, -math.log((1 - 0.01) / 0.01))
    return model


def main(arguments: list[str] | None = None) -> dict:
    """Train, print and return the losses and the seconds per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path, metavar="COCO_FOLDER")
    parser.add_argument("--checkpoint", help="a model on HuggingFace's hub to start from; default: a tiny random one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=320, help="short side of the images in pixels")
    parser.add_argument("--out", default="runs/huggingface")
    parser.add_argument("--plain", action="store_true", help="without the line of conddetr, to compare")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    size = {"shortest_edge": options.size, "longest_edge": options.size * 5 // 3}
    dataset = CocoImages(options.coco, ConditionalDetrImageProcessor(size=size))
    if options.checkpoint:
        model = ConditionalDetrForObjectDetection.from_pretrained(
            options.checkpoint, num_labels=dataset.num_labels, ignore_mismatched_sizes=True
        )
    else:
        model = tiny_model(dataset.num_labels)

    if not options.plain:
        print(conddetr.accelerate(model))  # the added line

    settings = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=dataset, data_collator=dataset.collate)
    result = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = result.metrics["train_runtime"] / options.steps
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; {seconds:.3f} s per step")
    return {"losses": losses, "seconds": seconds}


if __name__ == "__main__":
    main()
