"""The whole detector: inputs, options, the folded backbone, bad input."""

import copy

import pytest
import torch

import conddetr

SMALL = {"hidden_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 3, "ffn_dim": 32, "num_queries": 7}


def test_output_shapes_and_ranges(tiny_model):
    out = tiny_model([torch.randn(3, 40, 70), torch.randn(3, 64, 50)])
    assert out["pred_logits"].shape == (2, 25, 3)
    assert out["pred_boxes"].shape == (2, 25, 4)
    assert [sorted(layer) for layer in out["aux_outputs"]] == [["pred_boxes", "pred_logits"]]
    assert ((out["pred_boxes"] >= 0) & (out["pred_boxes"] <= 1)).all()


def test_detr_has_a_no_object_logit_and_optional_aux_outputs():
    out = conddetr.build("detr-tiny", num_classes=5, aux_loss=False).eval()([torch.randn(3, 40, 70)])
    assert out["pred_logits"].shape == (1, 25, 6)
    assert "aux_outputs" not in out


def test_list_mask_and_valid_sizes_agree(tiny_model):
    images = [torch.randn(3, 40, 70), torch.randn(3, 64, 50)]
    batch, mask = torch.full((2, 3, 64, 70), 0.0), torch.ones(2, 64, 70, dtype=torch.bool)
    for index, image in enumerate(images):
        batch[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = False
    expected = tiny_model(images)
    torch.testing.assert_close(tiny_model(batch, mask), expected)
    valid_hw = torch.tensor([[40, 70], [64, 50]], dtype=torch.int32)
    torch.testing.assert_close(tiny_model(batch, valid_hw=valid_hw), expected)


@pytest.mark.parametrize("preset", ["conditional-detr-r50", "detr-r50"])
def test_padding_changes_nothing(preset):
    """An image alone and padded give equal outputs: the ResNet reads zeros beyond the border in both cases."""
    model = conddetr.build(preset, **SMALL).eval().double()
    image = torch.randn(3, 64, 96, dtype=torch.float64)
    alone = model([image])
    batch, mask = torch.zeros(1, 3, 128, 160, dtype=torch.float64), torch.ones(1, 128, 160, dtype=torch.bool)
    batch[0, :, :64, :96], mask[0, :64, :96] = image, False
    hooked = []
    model.backbone.register_forward_hook(lambda module, args, output: hooked.append(output))
    model([image])
    # Features of the padded and the unpadded image differ at the border, so both runs use the same features.
    model.backbone.register_forward_hook(
        lambda module, args, output: torch.nn.functional.pad(hooked[0], (0, 2, 0, 2), value=3.0)
    )
    padded = model(batch, mask)
    torch.testing.assert_close(padded["pred_logits"], alone["pred_logits"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(padded["pred_boxes"], alone["pred_boxes"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{"csq": variant} for variant in ("full", "C", "T", "P", "I")])
def test_every_spatial_query_variant_trains_all_its_parameters(options):
    _assert_all_parameters_train(conddetr.build("conditional-detr-tiny", decoder_layers=3, **options))


@pytest.mark.parametrize("kind", ["generated", "learned", "zero"])
def test_every_kind_of_reference_point_trains_all_its_parameters(kind):
    model = conddetr.build("conditional-detr-tiny", reference_points=kind)
    _assert_all_parameters_train(model)
    reference = model.transformer.decoder.reference_logits(model.query_embed.weight)
    assert reference.shape == (25, 2)
    assert (reference == 0).all() == (kind == "zero")


def _assert_all_parameters_train(model):
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight)  # It starts at zero, which blocks all gradients.
    out = model([torch.randn(3, 48, 48)])
    (out["pred_logits"].sigmoid().square().sum() + out["pred_boxes"].square().sum()).backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None]
    assert not untouched


def test_spatial_query_variants_follow_the_paper():
    """Section 4.3 of the paper, for a layer after the first, on handmade inputs."""
    embedding, self_attended = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    p_s = conddetr.kernels.sine_embedding(torch.rand(7, 2), 32)
    expected = {
        "full": lambda mlp: mlp(embedding) * p_s,
        "C": lambda mlp: embedding,
        "T": lambda mlp: mlp(embedding),
        "P": lambda mlp: p_s.expand(2, 7, 32),
        "I": lambda mlp: mlp(self_attended) * p_s,
    }
    for variant, formula in expected.items():
        model = conddetr.build("conditional-detr-tiny", csq=variant, **SMALL)
        decoder = model.transformer.decoder
        query = decoder.layers[1]._spatial_query(embedding, self_attended, p_s, decoder.query_scale)
        torch.testing.assert_close(query.expand(2, 7, 32), formula(decoder.query_scale))
        assert (decoder.query_scale is None) == (variant in "CP")


def test_detr_without_positions_after_the_first_layer():
    model = conddetr.build("detr-tiny", cross_attention_positions="first-layer", decoder_layers=3).eval()
    inputs = []
    for layer in model.transformer.decoder.layers:
        layer.multihead_attn.register_forward_hook(lambda module, args, output: inputs.append(args))
    model([torch.randn(3, 48, 48)])
    key_is_memory = [bool(torch.equal(key, value)) for _, key, value in inputs]
    assert key_is_memory == [False, True, True]


def test_dilation_keeps_the_resolution():
    for dilation, size in ((False, (2, 3)), (True, (4, 6))):
        backbone = conddetr.build("conditional-detr-r50", dilation=dilation, **SMALL).eval().backbone
        with torch.no_grad():
            assert backbone(torch.randn(1, 3, 64, 96)).shape[-2:] == size


@pytest.mark.parametrize("preset", ["conditional-detr-r50", "conditional-detr-tiny", "detr-r50"])
def test_eager_calls_every_module(preset):
    """Including the embedding. Lists have no call, and PyTorch's attention reads its projection without a call."""
    model, called = conddetr.build(preset, **SMALL).eval(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: called.append(id(module)))
    with torch.no_grad():
        model([torch.randn(3, 64, 64)])
    silent = {name for name, module in model.named_modules() if id(module) not in called}
    lists = {name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    attentions = {name for name, module in model.named_modules() if type(module) is torch.nn.MultiheadAttention}
    assert silent == lists | {f"{name}.out_proj" for name in attentions}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_cast_model_stays_close_to_the_original(cast, backend):
    model = conddetr.build("conditional-detr-tiny", backend=backend).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        model = getattr(model, cast)()
        outputs = model(images.to(model.dtype))
    assert outputs["pred_logits"].dtype == model.dtype
    tolerance = 3 * torch.finfo(torch.bfloat16 if cast == "bfloat16" else torch.half).eps if cast != "double" else 1e-5
    torch.testing.assert_close(outputs["pred_boxes"].double(), expected["pred_boxes"].double(), rtol=0, atol=tolerance)


def test_folded_backbone_has_the_gradients_of_the_plain_backbone():
    plain = conddetr.build("conditional-detr-r50", **SMALL, backend="eager").double().train().backbone
    for buffer in plain.buffers():
        buffer.uniform_(0.5, 1.5)
    folded = copy.deepcopy(plain)
    folded[0].body.backend = "auto"
    compiled = torch.compile(copy.deepcopy(folded), backend="eager", fullgraph=True)
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    outputs = [backbone(images) for backbone in (plain, folded, compiled)]
    assert not torch.equal(*outputs[:2]), "nothing was folded"
    for backbone, output in zip((plain, folded, compiled), outputs, strict=True):
        torch.testing.assert_close(output, outputs[0], rtol=1e-9, atol=0)
        output.square().sum().backward()
        for (name, folded_weight), expected in zip(backbone.named_parameters(), plain.parameters(), strict=True):
            assert (folded_weight.grad is None) == (not folded_weight.requires_grad), name
            if folded_weight.requires_grad:
                # These float64 sums are much smaller than their terms.
                torch.testing.assert_close(
                    folded_weight.grad, expected.grad, rtol=1e-6, atol=1e-9 * expected.grad.abs().max()
                )


def test_fused_backends_fold_in_training():
    model = conddetr.build("conditional-detr-r50", **SMALL, backend="auto")
    assert model.backbone[0].body.backend == "auto"
    conddetr.accelerate(model, "eager")
    assert model.backbone[0].body.backend == "eager"
    model.backbone[0].body.layer3[2].register_forward_hook(lambda *_: None)
    report = conddetr.accelerate(model, "auto")
    assert model.backbone[0].body.backend == "auto"
    assert {part.name: part.note for part in report.left} == {"part of the backbone": "layer3.2: it has hooks"}
    assert "folded into the convolutions of 16 of 17 parts" in str(report)


def test_one_pixel_images(tiny_model):
    out = tiny_model([torch.randn(3, 1, 1), torch.randn(3, 33, 1)])
    assert torch.isfinite(out["pred_logits"]).all()


@pytest.mark.parametrize(
    ("images", "mask", "message"),
    [
        ([], None, "expected at least one image"),
        ([torch.randn(1, 8, 8)], None, r"images\[0\]: expected a non-empty \[3, H, W\] tensor, got \(1, 8, 8\)"),
        ([torch.randn(3, 8, 8), torch.randn(3, 0, 8)], None, r"images\[1\]: .*got \(3, 0, 8\)"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], None, r"images\[0\]: expected a floating dtype, got torch.uint8"),
        (["cat.jpg"], None, r"images\[0\]: expected .* tensor, got str"),
        (torch.randn(3, 8, 8), None, r"expected a non-empty batch \[B, 3, H, W\], got shape \(3, 8, 8\)"),
        (torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 9, dtype=torch.bool), r"mask: expected .*2, 8, 8\).*\(2, 8, 9\)"),
        (torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8), "mask: .*dtype torch.bool, got .*torch.float32"),
        ([torch.randn(3, 8, 8)], torch.zeros(1, 8, 8, dtype=torch.bool), "mask: pass it with a batch tensor only"),
    ],
)  # fmt: skip
def test_errors_name_the_bad_input(tiny_model, images, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(images, mask)


def test_errors_name_bad_valid_sizes(tiny_model):
    batch, sizes = torch.randn(2, 3, 8, 8), torch.tensor([[8, 8], [8, 6]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"valid_hw: expected shape \(2, 2\) .*, got \(1, 2\) and torch.int32"):
        tiny_model(batch, valid_hw=sizes[:1])
    with pytest.raises(ValueError, match=r"valid_hw: .*dtype torch.int32, got \(2, 2\) and torch.int64"):
        tiny_model(batch, valid_hw=sizes.long())
    with pytest.raises(ValueError, match="mask and valid_hw: expected at most one of them, got both"):
        tiny_model(batch, torch.zeros(2, 8, 8, dtype=torch.bool), valid_hw=sizes)
    with pytest.raises(ValueError, match="valid_hw: pass it with a batch tensor only"):
        tiny_model(list(batch), valid_hw=sizes)


def test_failed_download_error_gives_the_alternatives(monkeypatch):
    from torchvision.models import ResNet50_Weights

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", refuse)
    with pytest.raises(OSError, match=r"could not be downloaded \(no route to host\): download the file on another"):
        conddetr.build("conditional-detr-r50", pretrained_backbone=True)
