"""Attention maps equal the model's attention weights, are split as in the paper, and are drawn at their cells."""

import pytest
import torch
from torch import nn

import conddetr
from conddetr.kernels.attn import dense_spatial_keys
from conddetr.model.position import sine_position_encoding
from conddetr.viz.attention import AttentionMaps, attention_figure, attention_maps

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(preset, **options):
    torch.manual_seed(0)
    model = conddetr.build(preset, num_classes=3, **options).eval().to(DEVICE)
    return model, torch.randn(3, 64, 96, device=DEVICE)


def record_outputs(modules, run):
    """Call `run` and return the output of each named module."""
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
        for name, module in modules.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("preset", "backend"),
    [("conditional-detr-tiny", "eager"), ("conditional-detr-tiny", "triton"), ("detr-tiny", "eager")],
)
def test_combined_maps_reproduce_the_output_of_the_attention(preset, backend, layer):
    model, image = build(preset, backend=backend)
    seen = []
    block = model.transformer.decoder.layers[layer]
    is_conditional = preset.startswith("conditional")
    module = block.cross_attn if is_conditional else block.multihead_attn
    module.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    output, maps = attention_maps(model, image, layer)
    assert maps.weights.shape == (3, 25, 4, 4, 6)
    assert maps.layer == layer
    torch.testing.assert_close(maps.weights.sum((-2, -1)), torch.ones(3, 25, 4))
    torch.testing.assert_close(output["pred_logits"], model([image])["pred_logits"])

    args, attended = seen[0]
    if is_conditional:
        value = args[2].value
    else:
        attended = attended[0]
        value = nn.functional.linear(args[2], module.in_proj_weight[128:], module.in_proj_bias[128:])
    heads = value[0].unflatten(-1, (4, 16)).transpose(0, 1)
    combined = maps.weights[2].transpose(0, 1).flatten(-2).to(DEVICE)
    expected = module.out_proj((combined @ heads).transpose(0, 1).flatten(-2))
    torch.testing.assert_close(expected, attended[0].detach(), atol=1e-5, rtol=1e-4)

    # Scores are added, so weights are multiplied.
    product = (maps.weights[0] * maps.weights[1]).flatten(-2)
    product = (product / product.sum(-1, keepdim=True)).unflatten(-1, (4, 6))
    torch.testing.assert_close(product, maps.weights[2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_spatial_maps_follow_the_paper(layer):
    """The softmax of p_q·p_k / √32 (two halves of 16 per head), without other terms of a layer's queries and keys."""
    model, image = build("conditional-detr-tiny")
    block = model.transformer.decoder.layers[layer]
    outputs = record_outputs({"query": block.ca_qpos_sine_proj, "key": block.ca_kpos_proj}, lambda: model([image]))
    query, key = (outputs[name].reshape(-1, 4, 16) for name in ("query", "key"))
    expected = (torch.einsum("qhd,nhd->qhn", query, key) * 32**-0.5).softmax(-1).unflatten(-1, (4, 6)).detach().cpu()
    torch.testing.assert_close(attention_maps(model, image, layer)[1].weights[0], expected, atol=1e-6, rtol=1e-4)


def test_spatial_maps_of_detr_use_the_projected_positions():
    model, image = build("detr-tiny")
    attention = model.transformer.decoder.layers[1].multihead_attn
    seen = []
    hook = attention.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model([image])
    hook.remove()
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    position = sine_position_encoding(torch.zeros(1, 4, 6, dtype=torch.bool, device=DEVICE), 64)
    query = nn.functional.linear(seen[0], weight[:64], bias[:64]).reshape(-1, 4, 16)
    key = nn.functional.linear(position, weight[64:128]).reshape(-1, 4, 16)
    expected = (torch.einsum("qhd,nhd->qhn", query, key) / 4).softmax(-1).unflatten(-1, (4, 6)).detach().cpu()
    torch.testing.assert_close(attention_maps(model, image)[1].weights[0], expected, atol=1e-6, rtol=1e-4)


def test_detr_without_positions_has_flat_spatial_maps():
    model, image = build("detr-tiny", cross_attention_positions="first-layer")
    torch.testing.assert_close(attention_maps(model, image, 1)[1].weights[0], torch.full((25, 4, 4, 6), 1 / 24))


def test_fused_kernels_have_the_same_maps():
    plain, image = build("conditional-detr-tiny", backend="eager")
    fused, _ = build("conditional-detr-tiny", backend="triton")
    fused.load_state_dict(plain.state_dict())
    keys = []
    hook = fused.transformer.decoder.layers[0].cross_attn.register_forward_hook(lambda *call: keys.append(call[1][2]))
    for layer in range(2):
        weights = attention_maps(fused, image, layer)[1].weights
        torch.testing.assert_close(weights, attention_maps(plain, image, layer)[1].weights, atol=1e-6, rtol=1e-3)
    hook.remove()
    assert dense_spatial_keys(*keys[0].spatial).shape == (1, 24, 64)


def test_layer_out_of_range_is_an_error():
    model, image = build("conditional-detr-tiny")
    with pytest.raises(ValueError, match="layer: expected 0 to 1, or negative from the end, got 2"):
        attention_maps(model, image, 2)


def test_a_cell_is_drawn_at_the_centre_of_its_receptive_field():
    """Feature map of 8×8 cells over 128×128 pixels: the pixels of cell (4, 3) and the position of its drawn peak."""
    backbone = conddetr.build("conditional-detr-tiny").eval().backbone
    for parameter in backbone.parameters():
        nn.init.ones_(parameter)
    pixels = torch.ones(1, 3, 128, 128, requires_grad=True)
    backbone(pixels)[0, 0, 4, 3].backward()
    touched = pixels.grad[0, 0].nonzero().float()
    center_y, center_x = ((touched.min(0).values + touched.max(0).values) / 2).tolist()

    weights = torch.zeros(3, 1, 2, 8, 8)
    weights[..., 4, 3] = 1
    maps = AttentionMaps(weights, ("spatial", "content"), layer=0, cell=(16 / 128, 16 / 128))
    box = torch.tensor([[10.0, 20.0, 40.0, 50.0]])
    detections = conddetr.Detection(torch.tensor([0.5]), torch.tensor([1]), box, torch.tensor([0]), ["cat"])
    # Twice the size, as if the image had been resized for the model.
    figure = attention_figure(torch.rand(3, 256, 256), detections, 0, maps)
    assert len(figure.axes) == 1 + 3 * 2
    axes = figure.axes[1]
    gray, shade = axes.images
    left, right, bottom, top = shade.get_extent()
    values = torch.as_tensor(shade.get_array())
    row, column = (values == values.max()).nonzero().float().mean(0).tolist()
    y = top + (row + 0.5) / values.shape[0] * (bottom - top)
    x = left + (column + 0.5) / values.shape[1] * (right - left)
    assert (y, x) == pytest.approx((2 * center_y, 2 * center_x), abs=1.0)
    assert axes.get_xlim() == (-0.5, 255.5)
    assert tuple(gray.get_extent()) == (-0.5, 255.5, 255.5, -0.5)
    assert axes.patches[0].get_bbox().extents.tolist() == box[0].tolist()
    assert "cat 0.50" in figure.get_suptitle()
