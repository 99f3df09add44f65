"""Accelerated HuggingFace models: launches and waits of a training step, and dtypes of outputs."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from small_huggingface import small_batch, small_model
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

import conddetr
from null_gpu.counts import counted

if not hasattr(modeling, "ConditionalDetrDecoderCrossAttention"):
    pytest.skip("the encoder of transformers before 5 is left as it is", allow_module_level=True)


def count_step(model, autocast):
    """Counts of the third step: the first compiles, the second creates what is created once."""
    model.cuda().train()
    inputs = small_batch()
    pixels, mask = (inputs[name].cuda() for name in ("pixel_values", "pixel_mask"))
    labels = [{name: value.cuda() for name, value in label.items()} for label in inputs["labels"]]

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(pixels, mask, labels=labels).loss
        loss.backward()

    for _ in range(2):
        step()
    with counted() as counts:
        step()
    return counts


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("is_hooked", [False, True])
def test_step_never_waits(is_hooked, autocast):
    model = small_model(auxiliary_loss=True, dropout=0.1)
    conddetr.accelerate(model)
    if is_hooked:
        for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
            norm.register_forward_hook(lambda *_: None)
    assert count_step(model, autocast).waits == 0


def test_small_step_launches_few_kernels():
    """The counted number, and a few more for other versions; the backbone is left as it is."""
    model = small_model(dropout=0.1)
    conddetr.accelerate(model)
    assert count_step(model, autocast=True).launches <= 600


@pytest.mark.parametrize("autocast", [False, True])
def test_step_with_graphs_launches_two_graphs_and_the_loss(autocast):
    """The counted number, and a few more for other versions."""
    model = small_model(auxiliary_loss=True, dropout=0.1)
    conddetr.accelerate(model, graphs=True)
    counts = count_step(model, autocast)
    assert (counts.graph_launches, counts.waits) == (2, 0)
    assert counts.launches <= 280


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_outputs_have_the_dtypes_of_transformers(auxiliary_loss, autocast):
    model = small_model(auxiliary_loss=auxiliary_loss).cuda()
    names = ("last_hidden_state", "encoder_last_hidden_state", "logits", "pred_boxes")
    dtypes = []
    for is_accelerated in (False, True):
        if is_accelerated:
            conddetr.accelerate(model)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), conddetr.record_paths() as paths:
            out = model(small_batch()["pixel_values"].cuda())
        dtypes.append({name: getattr(out, name).dtype for name in names})
    assert set(paths["encoder"]) == set(paths["decoder"]) == {"fused operations"}
    assert dtypes[1] == dtypes[0]
