"""Problems of the training loss: matching, its cost, the losses of classes and boxes, the logged errors."""

from functools import partial

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from conddetr.kernels.boxes import matched_box_loss
from conddetr.kernels.check.inputs import Inputs, Maker, strided
from conddetr.kernels.check.problem import Peer, Problem
from conddetr.kernels.cost import matching_cost
from conddetr.kernels.errors import prediction_errors
from conddetr.kernels.focal import focal_loss
from conddetr.kernels.match import linear_assignment

LAYERS, QUERIES, CLASSES, OBJECTS = 6, 300, 91, 20
ALPHA, GAMMA = 0.25, 2.0


def problems(images: int) -> list[Problem]:
    """All problems of these operations."""
    model = (LAYERS, images, QUERIES, CLASSES, OBJECTS)
    single, odd, empty = (1, 1, 1, 1, 1), (2, 3, 70, 5, 9), (2, 2, 7, 5, 0)
    result = []
    for title, size in (("model", model), ("one of everything", single), ("no multiples of tiles", odd)):
        is_model = title == "model"
        result += [
            _focal(title, size, is_model),
            _boxes(title, size, is_model),
            _cost(title, size, "sigmoid", is_model),
            _errors(title, size, is_model),
            _assignment(title, size, is_model),
        ]
    return [
        *result,
        _focal("no objects", empty),
        _boxes("no objects", empty),
        _cost("softmax", odd, "softmax"),
        _errors("no objects", empty),
        _assignment("many objects", (1, 2, 70, CLASSES, 61)),
    ]


def _make(size: tuple[int, int, int, int, int], maker: Maker) -> Inputs:
    """Predictions around the prior of the focal loss. Image i has i fewer objects, at least none. Every layer matches
    each object with a query.
    """
    layers, images, queries, classes, objects = size
    counts = [max(0, objects - image) for image in range(images)]
    order = maker.order(layers, images, queries)
    numbers = torch.tensor(counts, device=maker.device)[:, None]
    made = {
        "logits": maker.normal(layers, images, queries, classes) - 2,
        "boxes": 0.01 + maker.uniform(layers, images, queries, 4),
        "objects": 0.01 + maker.uniform(images, objects, 4),
        "labels": maker.integers(classes, images, objects),
        "assignment": torch.where(order < numbers, order, -1),
        "counts": maker.exactly(counts, torch.int32),
    }
    if layers > 1 and layers != LAYERS:
        made |= {name: strided(made[name]) for name in ("logits", "boxes", "assignment")}
    return made


def _focal(title: str, size: tuple[int, int, int, int, int], is_model: bool = False) -> Problem:
    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        options = {"alpha": ALPHA, "gamma": GAMMA, "backend": backend, "labels": inputs["labels"]}
        return [focal_loss(inputs["logits"], inputs["assignment"], **options)]

    def by_torchvision(inputs: Inputs) -> list[Tensor]:
        """The loss as in the official code, on a one-hot tensor with an extra class that is cut off."""
        logits = inputs["logits"].float()
        index = inputs["assignment"].clamp(min=0)
        classes = inputs["labels"].expand(len(logits), -1, -1).gather(2, index)
        target = torch.where(inputs["assignment"] < 0, logits.shape[-1], classes)
        one_hot = logits.new_zeros((*logits.shape[:-1], logits.shape[-1] + 1)).scatter_(-1, target[..., None], 1)
        return [sigmoid_focal_loss(logits, one_hot[..., :-1], ALPHA, GAMMA).flatten(1).sum(1)]

    return Problem(
        "focal_loss",
        title,
        partial(_make, size),
        run,
        ("logits",),
        is_model=is_model,
        peers=(Peer(by_torchvision, ("logits",)), Peer(partial(run, backend="eager"), ("logits",))),
    )


def _boxes(title: str, size: tuple[int, int, int, int, int], is_model: bool = False) -> Problem:
    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        return [matched_box_loss(inputs["boxes"], inputs["objects"], inputs["assignment"], backend)]

    def layer_by_layer(inputs: Inputs) -> list[Tensor]:
        """The loss as in the official code, a loop over layers on matched pairs only."""
        losses = []
        for boxes, matched in zip(inputs["boxes"], inputs["assignment"], strict=True):
            image, query = (matched >= 0).nonzero(as_tuple=True)
            a, b = boxes[image, query].float(), inputs["objects"][image, matched[image, query]].float()
            corners = [box_convert(x, "cxcywh", "xyxy") for x in (a, b)]
            losses.append(torch.stack([(a - b).abs().sum(), generalized_box_iou_loss(*corners, reduction="sum")]))
        return [torch.stack(losses, 1)]

    return Problem(
        "matched_box_loss",
        title,
        partial(_make, size),
        run,
        ("boxes",),
        is_model=is_model,
        peers=(Peer(layer_by_layer, ("boxes",)), Peer(partial(run, backend="eager"), ("boxes",))),
    )


def _cost(title: str, size: tuple[int, int, int, int, int], activation: str, is_model: bool = False) -> Problem:
    names = ("logits", "boxes", "labels", "objects", "counts")

    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        return [matching_cost(*(inputs[name] for name in names), activation=activation, backend=backend)]

    return Problem("matching_cost", title, partial(_make, size), run, is_model=is_model)


def _errors(title: str, size: tuple[int, int, int, int, int], is_model: bool = False) -> Problem:
    names = ("logits", "assignment", "labels", "counts")

    def make(maker: Maker) -> Inputs:
        made = _make(size, maker)
        # Few distinct values, exact in every dtype, so that ties occur.
        made["logits"] = made["logits"].float().round().clamp(-3, 3).to(maker.dtype)
        return made

    def run(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        return prediction_errors(*(inputs[name] for name in names), backend=backend)

    return Problem("prediction_errors", title, make, run, is_model=is_model)


def _assignment(title: str, size: tuple[int, int, int, int, int], is_model: bool = False) -> Problem:
    layers, images, queries, _, objects = size

    def make(maker: Maker) -> Inputs:
        counts = [min(max(0, objects - image), queries) for image in range(images)]
        return {"cost": maker.normal(layers, images, objects, queries), "counts": maker.exactly(counts, torch.int32)}

    return Problem(
        "linear_assignment",
        title,
        make,
        lambda inputs, backend: [linear_assignment(inputs["cost"], inputs["counts"], backend)],
        dtypes=(torch.float32,),
        is_model=is_model,
        judge=_judge_assignment,
    )


def _judge_assignment(inputs: Inputs, outputs: list[Tensor], expected: list[Tensor]) -> str | None:
    """Check that every object has one query, and that the total cost equals scipy's."""
    cost, counts = inputs["cost"].double().cpu(), inputs["counts"].tolist()
    ours, best = outputs[0].cpu(), expected[0].cpu()
    for layer in range(len(cost)):
        for image, count in enumerate(counts):
            objects = ours[layer, image]
            if sorted(objects[objects >= 0].tolist()) != list(range(count)) or (objects < -1).any():
                return f"image {image} of layer {layer}: not every object has one query"
            totals = [_total(cost[layer, image], x[layer, image]) for x in (ours, best)]
            if abs(totals[0] - totals[1]) > 1e-12 * cost[layer, image].abs().sum().item():
                return f"image {image} of layer {layer}: its cost is {totals[0]:.9g}, the optimum is {totals[1]:.9g}"
    return None


def _total(cost: Tensor, objects: Tensor) -> float:
    query = (objects >= 0).nonzero()[:, 0]
    return cost[objects[query], query].sum().item()
