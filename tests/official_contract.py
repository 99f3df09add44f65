"""A model and a criterion with the interface of the official repository: parameter names, call signatures, and
sequence-first tensors inside. The code is written for this project, in plain PyTorch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from golden_rule import rule_weight
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision import ops
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter

from conddetr.kernels.prediction import inverse_sigmoid
from conddetr.model.layers import MLP
from conddetr.model.position import sine_position_encoding


class Nested(NamedTuple):
    """A padded batch and its mask, True = padding."""

    tensors: torch.Tensor
    mask: torch.Tensor

    def decompose(self):
        return self.tensors, self.mask


def nest(images):
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch, mask = images[0].new_zeros(len(images), 3, height, width), torch.ones(len(images), height, width).bool()
    for index, image in enumerate(images):
        batch[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = False
    return Nested(batch, mask)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        resnet = resnet50(weights=None, norm_layer=ops.FrozenBatchNorm2d)
        for name, parameter in resnet.named_parameters():
            parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
        self.body = IntermediateLayerGetter(resnet, return_layers={"layer4": "0"})
        self.num_channels = 2048

    def forward(self, nested):
        images, mask = nested.decompose()
        maps = self.body(images)
        resize = lambda x: F.interpolate(mask[None].float(), size=x.shape[-2:])[0].bool()  # noqa: E731
        return {name: Nested(x, resize(x)) for name, x in maps.items()}


class Position(nn.Module):
    def forward(self, nested):
        size = nested.mask.shape[1:]
        return sine_position_encoding(nested.mask, 256).transpose(1, 2).unflatten(2, size).to(nested.tensors.dtype)


class Joiner(nn.Sequential):
    def forward(self, nested):
        maps = list(self[0](nested).values())
        return maps, [self[1](x) for x in maps]


class Attention(nn.Module):
    """Attention of projected tokens [n, B, C·k], sequence first; all scores are stored."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = heads, dropout
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query, key, value, attn_mask=None, key_padding_mask=None):
        query, key, value = (x.unflatten(2, (self.num_heads, -1)) for x in (query, key, value))
        scores = torch.einsum("qbhc,kbhc->bhqk", query, key) / query.shape[-1] ** 0.5
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], float("-inf"))
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.out_proj(torch.einsum("bhqk,kbhc->qbhc", weights, value).flatten(2)), weights.mean(1)


class Layer(nn.Module):
    def __init__(self, dim, ffn, dropout, norms):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.dropout = nn.Dropout(dropout)
        for index in range(1, norms + 1):
            self.add_module(f"norm{index}", nn.LayerNorm(dim))
            self.add_module(f"dropout{index}", nn.Dropout(dropout))
        self.activation, self.normalize_before = F.relu, False

    def feed_forward(self, x):
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class EncoderLayer(Layer):
    def __init__(self, dim, heads, ffn, dropout):
        super().__init__(dim, ffn, dropout, norms=2)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout)

    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        attended = self.self_attn(src + pos, src + pos, src, key_padding_mask=src_key_padding_mask)[0]
        src = self.norm1(src + self.dropout1(attended))
        return self.norm2(src + self.dropout2(self.feed_forward(src)))


class DecoderLayer(Layer):
    def __init__(self, dim, heads, ffn, dropout, is_first):
        super().__init__(dim, ffn, dropout, norms=3)
        for name in ("qcontent", "qpos", "kcontent", "kpos", "v"):
            self.add_module(f"sa_{name}_proj", nn.Linear(dim, dim))
            self.add_module(f"ca_{name}_proj", nn.Linear(dim, dim))
        if not is_first:
            self.ca_qpos_proj = None
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.self_attn, self.cross_attn = Attention(dim, heads, dropout), Attention(dim, heads, dropout)
        self.nhead = heads

    def forward(self, tgt, memory, memory_key_padding_mask, pos, query_pos, query_sine_embed, is_first):
        query = self.sa_qcontent_proj(tgt) + self.sa_qpos_proj(query_pos)
        key = self.sa_kcontent_proj(tgt) + self.sa_kpos_proj(query_pos)
        tgt = self.norm1(tgt + self.dropout1(self.self_attn(query, key, self.sa_v_proj(tgt))[0]))
        query, key, k_pos = self.ca_qcontent_proj(tgt), self.ca_kcontent_proj(memory), self.ca_kpos_proj(pos)
        if is_first:
            query, key = query + self.ca_qpos_proj(query_pos), key + k_pos
        query = self._by_head(query, self.ca_qpos_sine_proj(query_sine_embed))
        value, padding = self.ca_v_proj(memory), memory_key_padding_mask
        attended = self.cross_attn(query, self._by_head(key, k_pos), value, key_padding_mask=padding)[0]
        tgt = self.norm2(tgt + self.dropout2(attended))
        return self.norm3(tgt + self.dropout3(self.feed_forward(tgt)))

    def _by_head(self, *parts):
        return torch.cat([x.unflatten(2, (self.nhead, -1)) for x in parts], dim=3).flatten(2)


class Stack(nn.Module):
    """The encoder."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), None

    def forward(self, src, src_key_padding_mask, pos):
        for layer in self.layers:
            src = layer(src, src_key_padding_mask=src_key_padding_mask, pos=pos)
        return src


class Decoder(nn.Module):
    def __init__(self, layers, dim):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(dim)
        self.query_scale, self.ref_point_head = MLP(dim, dim, dim, 2), MLP(dim, dim, 2, 2)
        self.return_intermediate = True

    def forward(self, tgt, memory, memory_key_padding_mask, pos, query_pos):
        reference = self.ref_point_head(query_pos).sigmoid()
        outputs = []
        for index, layer in enumerate(self.layers):
            embedding = sine(reference) * (self.query_scale(tgt) if index else 1)
            tgt = layer(tgt, memory, memory_key_padding_mask, pos, query_pos, embedding, index == 0)
            outputs.append(self.norm(tgt))
        return [torch.stack(outputs).transpose(1, 2), reference.transpose(0, 1)]


def sine(points):
    """[Q, B, 2] as (x, y) -> [Q, B, 256]: the half of y first, with alternating sines and cosines."""
    divisors = 10000 ** (torch.arange(0, 128, 2).float() / 128)
    angles = points.flip(-1).unsqueeze(-1) * (2 * torch.pi) / divisors
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(2)


class Transformer(nn.Module):
    def __init__(self, dim=256, heads=8, layers=6, ffn=2048, dropout=0.0):
        super().__init__()
        self.d_model, self.nhead = dim, heads
        self.encoder = Stack(EncoderLayer(dim, heads, ffn, dropout) for _ in range(layers))
        self.decoder = Decoder([DecoderLayer(dim, heads, ffn, dropout, not i) for i in range(layers)], dim)

    def forward(self, src, mask, query_embed, pos_embed):
        src, pos = (x.flatten(2).permute(2, 0, 1) for x in (src, pos_embed))
        query = query_embed.unsqueeze(1).repeat(1, src.shape[1], 1)
        memory = self.encoder(src, mask.flatten(1), pos)
        return self.decoder(torch.zeros_like(query), memory, mask.flatten(1), pos, query)


class ConditionalDETR(nn.Module):
    def __init__(self, transformer, num_classes=91, num_queries=300):
        super().__init__()
        self.transformer, dim = transformer, transformer.d_model
        self.class_embed, self.bbox_embed = nn.Linear(dim, num_classes), MLP(dim, dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.backbone = Joiner(Backbone(), Position())
        self.input_proj = nn.Conv2d(2048, dim, 1)
        self.aux_loss = True

    def forward(self, samples):
        features, pos = self.backbone(nest(samples) if isinstance(samples, list) else samples)
        src, mask = features[-1]
        hs, reference = self.transformer(self.input_proj(src), mask, self.query_embed.weight, pos[-1])
        layers = []
        for tokens in hs:
            boxes = self.bbox_embed(tokens)
            boxes[..., :2] += inverse_sigmoid(reference)
            layers.append({"pred_logits": self.class_embed(tokens), "pred_boxes": boxes.sigmoid()})
        return {**layers[-1], "aux_outputs": layers[:-1]}


class HungarianMatcher(nn.Module):
    cost_class, cost_bbox, cost_giou = 2, 5, 2

    @torch.no_grad()
    def forward(self, outputs, targets):
        pairs = []
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
            p = logits.sigmoid()[:, target["labels"]]
            cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
            corners = (ops.box_convert(x, "cxcywh", "xyxy") for x in (boxes, target["boxes"]))
            distance = torch.cdist(boxes, target["boxes"], p=1)
            cost = self.cost_class * cost + self.cost_bbox * distance
            cost = cost - self.cost_giou * ops.generalized_box_iou(*corners)
            pairs.append(tuple(map(torch.as_tensor, linear_sum_assignment(cost))))
        return pairs


class SetCriterion(nn.Module):
    def __init__(self, num_classes=91, losses=("labels", "boxes", "cardinality"), focal_alpha=0.25):
        super().__init__()
        self.num_classes, self.matcher, self.focal_alpha = num_classes, HungarianMatcher(), focal_alpha
        self.losses, self.weight_dict = list(losses), {}
        for suffix in ("", *(f"_{i}" for i in range(5))):
            self.weight_dict |= {f"loss_ce{suffix}": 2, f"loss_bbox{suffix}": 5, f"loss_giou{suffix}": 2}

    def forward(self, outputs, targets):
        num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
        losses = {}
        for index, layer in enumerate([*outputs["aux_outputs"], outputs]):
            suffix = f"_{index}" if index < len(outputs["aux_outputs"]) else ""
            layer_losses = self._losses_of(layer, targets, num_boxes)
            if suffix:
                del layer_losses["class_error"]
            losses |= {name + suffix: value for name, value in layer_losses.items()}
        return losses

    def _losses_of(self, layer, targets, num_boxes):
        logits, boxes = layer["pred_logits"], layer["pred_boxes"]
        pairs = self.matcher(layer, targets)
        image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
        query = torch.cat([q for q, _ in pairs])
        matched = {k: torch.cat([t[k][n] for t, (_, n) in zip(targets, pairs, strict=True)]) for k in targets[0]}
        one_hot = torch.zeros_like(logits)
        one_hot[image, query, matched["labels"]] = 1
        count = torch.tensor([len(target["labels"]) for target in targets]).float()
        is_right = logits[image, query].argmax(-1) == matched["labels"]
        corners = [ops.box_convert(x, "cxcywh", "xyxy") for x in (boxes[image, query], matched["boxes"])]
        return {
            "loss_ce": ops.sigmoid_focal_loss(logits, one_hot, self.focal_alpha, 2, "sum") / num_boxes,
            "loss_bbox": (boxes[image, query] - matched["boxes"]).abs().sum() / num_boxes,
            "loss_giou": (1 - ops.generalized_box_iou(*corners).diagonal()).sum() / num_boxes,
            "class_error": 100 - 100 * is_right.float().mean(),
            "cardinality_error": ((logits.argmax(-1) != logits.shape[-1] - 1).sum(1) - count).abs().mean(),
        }


def with_rule_weights(model):
    """Load the weights of the golden set."""
    model.load_state_dict({name: rule_weight(name, tuple(x.shape)) for name, x in model.state_dict().items()})
    return model
