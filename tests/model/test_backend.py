"""The model on fused kernels, compared with the model in plain PyTorch."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import conddetr
from conddetr.kernels import native
from conddetr.kernels.attn import rectangle_padding
from conddetr.model.detr import pad_images

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def models(**options):
    torch.manual_seed(0)
    plain = conddetr.build("conditional-detr-tiny", num_classes=3, backend="eager", **options)
    fused = conddetr.build("conditional-detr-tiny", num_classes=3, backend="triton", **options)
    fused.load_state_dict(plain.state_dict())
    return plain.to(DEVICE), fused.to(DEVICE)


def batch(count, size=64, step=16):
    images = [torch.randn(3, size, size + step * index, device=DEVICE) for index in range(count)]
    targets = [{"labels": torch.tensor([index % 3]), "boxes": torch.rand(1, 4) * 0.3 + 0.3} for index in range(count)]
    return images, targets


@pytest.mark.parametrize(("csq", "padding"), [("full", "valid_hw"), ("full", "mask"), ("full", "none"), ("I", "none")])
def test_outputs_and_gradients_agree(csq, padding):
    images, targets = batch(2, step=0 if padding == "none" else 16)
    images, valid_hw = pad_images(images)
    options = {"valid_hw": valid_hw}
    if padding == "mask":
        size = images.shape[-2:]
        options = {"mask": rectangle_padding(valid_hw, *size).unflatten(1, size)}
    results = []
    for model in models(csq=csq):
        torch.nn.init.normal_(model.bbox_embed.layers[-1].weight, generator=torch.Generator(DEVICE).manual_seed(0))
        out = model(images, **options)
        conddetr.build_criterion(model)(out, targets)["loss"].backward()
        results.append((out["pred_logits"], out["pred_boxes"], {n: p.grad for n, p in model.named_parameters()}))
    (logits, boxes, grads), (fused_logits, fused_boxes, fused_grads) = results
    torch.testing.assert_close(fused_logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused_boxes, boxes, atol=1e-6, rtol=1e-5)
    for name, grad in grads.items():
        # Gradients of key biases are rounding noise.
        torch.testing.assert_close(fused_grads[name], grad, atol=1e-5 * max(1.0, grad.abs().max().item()), rtol=1e-3)


def test_ten_steps_give_the_same_loss_curve():
    curves = []
    # One head, because the interpreter's time grows with the heads.
    for model in models(num_heads=1):
        torch.manual_seed(1)
        criterion = conddetr.build_criterion(model, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        curve = []
        images, targets = batch(2, size=32)
        for _ in range(10):
            loss = criterion(model(images), targets)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)


@pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
@pytest.mark.parametrize("padding", ["valid_hw", "mask"])
def test_flops_of_a_training_step_equal_plain_pytorchs(padding):
    # Always on the CPU, because only CPU kernels support the tiny preset's widths.
    images, valid_hw = (tensor.cpu() for tensor in pad_images(batch(2)[0]))
    size = images.shape[-2:]
    options = {"valid_hw": valid_hw}
    if padding == "mask":
        options = {"mask": rectangle_padding(valid_hw, *size).unflatten(1, size)}
    counts = []
    for backend in ("eager", "native"):
        model = conddetr.build("conditional-detr-tiny", num_classes=3, backend=backend)
        # Without the math kernel, PyTorch would also count the recomputation of fused attention in backward.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images, **options)["pred_logits"].sum().backward()
        counts.append(counter.get_total_flops())
    saved = 0
    if padding == "valid_hw":
        # Keys and weight gradients are of rows and columns, with half the channels each, instead of all cells.
        height, width, dim = size[0] // 16, size[1] // 16, model.config.hidden_dim
        dense, separable = height * width * dim * dim, (height + width) * dim * dim // 2
        saved = 2 * 2 * len(images) * model.config.decoder_layers * (dense - separable)
    assert counts[0] - counts[1] == saved


@pytest.mark.slow
def test_model_compiles_without_a_graph_break():
    _, fused = models(dropout=0.0)
    images, valid_hw = pad_images(batch(2)[0])
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, valid_hw=valid_hw), fused(images, valid_hw=valid_hw))


def test_half_precision_keeps_reference_points_and_boxes_in_float32():
    """bfloat16 has eight bits: a coordinate would have a resolution of 1/256 of the image."""
    plain, fused = models(dropout=0.0)
    images, _ = batch(2)
    for model in (plain.eval(), fused.eval()):
        exact = model(images)
        with torch.autocast(DEVICE, torch.bfloat16):
            outputs = model(images)
        assert outputs["pred_boxes"].dtype == outputs["pred_logits"].dtype == torch.float32
        torch.testing.assert_close(outputs["pred_logits"], exact["pred_logits"], atol=0.05, rtol=0)
        # The last layer of the box head starts at zero: boxes are at the reference points.
        torch.testing.assert_close(outputs["pred_boxes"], exact["pred_boxes"], atol=1e-6, rtol=0)


def test_unavailable_backend_requested_by_name_is_an_error(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("Triton runs on this GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _, fused = models()
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here"):
        fused([torch.randn(3, 32, 32)])
    automatic = conddetr.build("conditional-detr-tiny", backend="auto").eval()
    assert automatic([torch.randn(3, 32, 32)])["pred_logits"].shape == (1, 25, 91)
