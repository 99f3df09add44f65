"""Attention maps are the weights that the model used."""

import pytest
import torch

import conddetr
from conddetr.viz.attention import attention_maps


@pytest.mark.parametrize(
    ("preset", "backend"),
    [("conditional-detr-tiny", "eager"), ("conditional-detr-tiny", "triton"), ("detr-tiny", "eager")],
)
def test_maps_reproduce_the_output_of_the_attention(preset, backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = conddetr.build(preset, num_classes=3, backend=backend).eval().to(device)
    image = torch.randn(3, 64, 96, device=device)
    seen = []
    layer = model.transformer.decoder.layers[1]
    is_conditional = preset.startswith("conditional")
    module = layer.cross_attn if is_conditional else layer.multihead_attn
    module.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    output, maps = attention_maps(model, image)
    assert maps.shape == (2, 4, 25, 4, 6)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 4, 25))
    torch.testing.assert_close(output["pred_logits"], model([image])["pred_logits"])

    args, attended = seen[0]
    if is_conditional:
        value = args[2].value
    else:
        attended = attended[0]
        weight, bias = module.in_proj_weight[128:], module.in_proj_bias[128:]
        value = torch.nn.functional.linear(args[2], weight, bias)
    heads = value[0].unflatten(-1, (4, 16)).transpose(0, 1)
    expected = module.out_proj((maps[1].flatten(-2).to(device) @ heads).transpose(0, 1).flatten(-2))
    torch.testing.assert_close(expected, attended[0].detach(), atol=1e-5, rtol=1e-4)
