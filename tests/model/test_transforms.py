"""The whole model inside function transforms, compared with ordinary gradients and finite differences."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import conddetr
from conddetr.kernels import native, registry

VALID = torch.tensor([[32, 48], [25, 40]], dtype=torch.int32)
TARGETS = [
    {"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.3, 0.2]])},
    {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])},
]


class Case:
    """A small model with criterion and images, and its loss as a function of its parameters."""

    def __init__(self, preset: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        layers = {"encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0}
        sizes = {"num_classes": 3, "num_queries": 4, "hidden_dim": 32, "num_heads": 2, "ffn_dim": 32}
        self.model = conddetr.build(preset, backend=backend, **layers, **sizes).to(dtype).eval()
        if preset != "detr-tiny":
            # The layer starts at zero, so boxes would not depend on most of the model.
            torch.nn.init.normal_(self.model.bbox_embed.layers[-1].weight)
        self.criterion = conddetr.build_criterion(self.model)
        self.images = torch.randn(2, 3, 32, 48, dtype=dtype)
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}

    def loss(self, parameters: dict) -> torch.Tensor:
        out = functional_call(self.model, parameters, (self.images,), {"valid_hw": VALID})
        return self.criterion(out, TARGETS)["loss"]

    def gradients(self) -> dict:
        self.criterion(self.model(self.images, valid_hw=VALID), TARGETS)["loss"].backward()
        return {name: p.grad for name, p in self.model.named_parameters()}


def dot(a: dict, b: dict) -> torch.Tensor:
    return sum((a[name] * b[name]).sum() for name in a)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("preset", ["conditional-detr-tiny", "detr-tiny"])
def test_functional_gradients_and_tangents_equal_ordinary_gradients(preset, backend):
    case = Case(preset, backend)
    expected = case.gradients()
    for name, gradient in grad(case.loss)(case.parameters).items():
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * scale, rtol=1e-3)
    direction = {name: torch.randn_like(p) for name, p in case.parameters.items()}
    _, tangent = jvp(case.loss, (case.parameters,), (direction,))
    # PyTorch returns a float64 tangent for a Python number times a scalar tensor.
    torch.testing.assert_close(tangent, dot(expected, direction), rtol=1e-3, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("preset", ["conditional-detr-tiny", "detr-tiny"])
@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
def test_hessian_products_equal_finite_differences(is_training, preset, backend):
    case = Case(preset, backend, torch.float64)
    case.model.train(is_training)
    # Batch norms cannot update their statistics inside transforms.
    case.model.backbone.eval()
    direction = {name: torch.randn_like(p) for name, p in case.parameters.items()}
    # Small enough that no ReLU changes its side and the assignment is the same on both sides.
    step = 1e-8
    ahead, behind = (
        grad(case.loss)({name: p + sign * step * direction[name] for name, p in case.parameters.items()})
        for sign in (1, -1)
    )
    _, forward_over_reverse = jvp(grad(case.loss), (case.parameters,), (direction,))
    reverse_twice = grad(lambda parameters: dot(grad(case.loss)(parameters), direction))(case.parameters)
    leaves = {name: p.clone().requires_grad_() for name, p in case.parameters.items()}
    first = torch.autograd.grad(case.loss(leaves), list(leaves.values()), create_graph=True)
    ordinary = torch.autograd.grad(dot(dict(zip(leaves, first, strict=True)), direction), list(leaves.values()))
    for index, name in enumerate(leaves):
        expected = (ahead[name] - behind[name]) / (2 * step)
        for product in (forward_over_reverse[name], reverse_twice[name], ordinary[index]):
            torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_vmap_gives_the_gradients_of_each_image(backend):
    case = Case("conditional-detr-tiny", backend)

    def size(parameters, image):
        out = functional_call(case.model, parameters, (image[None],))
        return out["pred_logits"].square().mean() + out["pred_boxes"].square().mean()

    gradients = vmap(grad(size), (None, 0))(case.parameters, case.images)
    for index, image in enumerate(case.images):
        for name, expected in grad(size)(case.parameters, image).items():
            torch.testing.assert_close(gradients[name][index], expected, atol=1e-5, rtol=1e-3)


def test_the_criterion_inside_vmap_is_an_error():
    case = Case("conditional-detr-tiny", "eager")

    def loss(image, label, box):
        return case.criterion(case.model(image[None]), [{"labels": label, "boxes": box}])["loss"]

    with pytest.raises(RuntimeError, match=r"the criterion.* does not run inside torch\.func\.vmap"):
        vmap(loss)(case.images, torch.tensor([[0], [1]]), torch.rand(2, 1, 4))


@pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
def test_error_of_a_requested_backend_names_eager():
    case = Case("conditional-detr-tiny", "native")
    tangent = ({name: torch.ones_like(p) for name, p in case.parameters.items()},)
    leaves = [p for p in case.model.parameters() if p.requires_grad]
    for call in (
        lambda: grad(case.loss)(case.parameters),
        lambda: jvp(case.loss, (case.parameters,), tangent),
        lambda: vmap(lambda image: case.model(image[None]))(case.images),
        lambda: (
            torch.stack(
                [
                    g.sum()
                    for g in torch.autograd.grad(
                        case.loss(dict(case.model.named_parameters())), leaves, create_graph=True
                    )
                ]
            )
            .sum()
            .backward()
        ),
    ):
        with pytest.raises(registry.BackendError, match='backend="eager"'):
            call()
