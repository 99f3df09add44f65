"""Problems of a layer's operations beside its products: norms, dropout, pooling, and the weights of a step."""

import torch
from torch import Tensor

from conddetr.kernels.add_norm import add_norm
from conddetr.kernels.check.inputs import Inputs, Maker, channels_last, strided
from conddetr.kernels.check.problem import Dropout, Problem
from conddetr.kernels.cpu.dropout import dropout_add
from conddetr.kernels.pool import max_pool
from conddetr.kernels.registry import FLOATS
from conddetr.kernels.relu_dropout import relu_dropout
from conddetr.kernels.weights import FrozenNorm, Recipe, Replicas, Shift, Weight, prepare_weights

CELLS, CHANNELS, HIDDEN = 850, 256, 2048
P = 0.1
VECTORS = ("weight", "bias", "branch_bias")


def problems(images: int) -> list[Problem]:
    """All problems of these operations."""
    model = (images, CELLS, CHANNELS)
    return [
        _add_norm("model", model, P, is_model=True),
        _add_norm("model, trunk of float32, in bfloat16", model, P, torch.bfloat16, is_model=True),
        _add_norm("trunk of float32, in float16", (1, 300, CHANNELS), P, torch.float16),
        _add_norm("one token", (1, 1, CHANNELS), 0.0),
        _add_norm("no multiples of tiles, with gaps in memory", (3, 11, 33), 0.3, is_strided=True),
        _relu_dropout("model", (images, CELLS, HIDDEN), P, is_model=True),
        _relu_dropout("one element", (1, 1), 0.0),
        _relu_dropout("no multiples of tiles, with gaps in memory", (3, 7, 33), 0.3, is_strided=True),
        _dropout_add("model", model, P, is_model=True),
        _dropout_add("one element", (1,), 0.3),
        _dropout_add("no multiples of tiles, with gaps in memory", (3, 7, 33), 0.3, is_strided=True),
        _max_pool("model", (images, 64, 200, 267), is_model=True),
        _max_pool("one cell", (1, 3, 1, 1)),
        _max_pool("one row of cells", (2, 5, 1, 8)),
        _max_pool("no multiples of tiles", (2, 33, 13, 7)),
        _weights("part of the model", _model_shapes(), is_model=True),
        _weights("small and odd", ((6, 5, 1, 1), (7, 70, 3, 3), (1, 1), (9, 33))),
    ]


def _add_norm(
    title: str,
    shape: tuple[int, int, int],
    p: float,
    half: torch.dtype | None = None,
    is_strided: bool = False,
    is_model: bool = False,
) -> Problem:
    """`half`: dtype of the branch, beside a float32 trunk and float32 vectors, as under autocast."""
    channels = shape[-1]

    def make(maker: Maker) -> Inputs:
        branch, residual = maker.normal(*shape, dtype=half), maker.normal(*shape)
        if is_strided:
            branch, residual = strided(branch), strided(residual)
        return {
            "branch": branch,
            "residual": residual,
            "weight": 1 + maker.normal(channels, scale=0.1),
            "bias": maker.normal(channels),
            "branch_bias": maker.normal(channels),
            "position": maker.normal(1, *shape[1:], dtype=half),
            "seed": maker.exactly([2**31 - 5], torch.int64),
        }

    def run(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        return _call_add_norm(inputs, backend, p, inputs["branch_bias"])

    def kept(inputs: Inputs, backend: str) -> Tensor:
        """With a branch of alternating ±1 and no residual, dropped elements stay near the mean, which is about 0."""
        branch = inputs["branch"]
        signs = 1 - 2 * (torch.arange(channels, device=branch.device) % 2)
        ones = {
            **inputs,
            "branch": torch.ones_like(branch).mul_(signs),
            "residual": torch.zeros_like(inputs["residual"]),
            "weight": torch.ones_like(inputs["weight"]),
            "bias": torch.zeros_like(inputs["bias"]),
        }
        return _call_add_norm(ones, backend, p, None)[0].abs() > 0.5

    def plain(inputs: Inputs, kept: Tensor) -> tuple[Tensor, ...]:
        branch = inputs["branch"]
        dropped = ((branch + inputs["branch_bias"]) * kept / (1 - p)).to(branch.dtype)
        return _call_add_norm({**inputs, "branch": dropped}, "eager", 0.0, None)

    return Problem(
        "add_norm",
        title,
        make,
        run,
        ("branch", "residual", *VECTORS),
        dtypes=FLOATS if half is None else (torch.float32,),
        is_model=is_model,
        dropout=Dropout(p, kept, plain) if p > 0 else None,
    )


def _call_add_norm(inputs: Inputs, backend: str, p: float, branch_bias: Tensor | None) -> tuple[Tensor, ...]:
    tensors = [inputs[name] for name in ("branch", "residual", "weight", "bias")]
    options = {"position": inputs["position"], "dropout_p": p, "seed": inputs["seed"], "backend": backend}
    return add_norm(*tensors, branch_bias=branch_bias, **options)


def _relu_dropout(
    title: str, shape: tuple[int, ...], p: float, is_strided: bool = False, is_model: bool = False
) -> Problem:
    def make(maker: Maker) -> Inputs:
        x = maker.normal(*shape)
        seed = maker.exactly([2**31 - 5], torch.int64)
        return {"x": strided(x) if is_strided else x, "bias": maker.normal(shape[-1]), "seed": seed}

    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        return [relu_dropout(inputs["x"], p, backend, inputs["bias"], inputs["seed"])]

    def kept(inputs: Inputs, backend: str) -> Tensor:
        ones, zeros = torch.ones_like(inputs["x"]), torch.zeros_like(inputs["bias"])
        return relu_dropout(ones, p, backend, zeros, inputs["seed"]) > 0

    def plain(inputs: Inputs, kept: Tensor) -> list[Tensor]:
        return [relu_dropout(inputs["x"], 0.0, "eager", inputs["bias"]) * kept / (1 - p)]

    dropout = Dropout(p, kept, plain) if p > 0 else None
    return Problem("relu_dropout", title, make, run, ("x", "bias"), is_model=is_model, dropout=dropout)


def _dropout_add(
    title: str, shape: tuple[int, ...], p: float, is_strided: bool = False, is_model: bool = False
) -> Problem:
    def make(maker: Maker) -> Inputs:
        made = {"x": maker.normal(*shape), "residual": maker.normal(*shape)}
        return {name: strided(x) for name, x in made.items()} if is_strided else made

    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        return [dropout_add(inputs["x"], inputs["residual"], p, backend)]

    def kept(inputs: Inputs, backend: str) -> Tensor:
        """Sampled from the generator, which has the same state before every run."""
        ones, zeros = torch.ones_like(inputs["x"]), torch.zeros_like(inputs["residual"])
        return dropout_add(ones, zeros, p, backend) > 0

    def plain(inputs: Inputs, kept: Tensor) -> list[Tensor]:
        return [inputs["residual"] + inputs["x"] * kept / (1 - p)]

    dropout = Dropout(p, kept, plain)
    return Problem("dropout_add", title, make, run, ("x", "residual"), is_model=is_model, dropout=dropout)


def _max_pool(title: str, shape: tuple[int, int, int, int], is_model: bool = False) -> Problem:
    return Problem(
        "max_pool",
        title,
        lambda maker: {"x": channels_last(maker.normal(*shape))},
        lambda inputs, backend: [max_pool(inputs["x"], backend)],
        is_model=is_model,
    )


def _model_shapes() -> tuple[tuple[int, ...], ...]:
    """Shapes of a backbone stage, and of the matrices of an encoder and a decoder layer."""
    block = ((256, 1024, 1, 1), (256, 256, 3, 3), (1024, 256, 1, 1))
    square, network = (CHANNELS, CHANNELS), ((HIDDEN, CHANNELS), (CHANNELS, HIDDEN))
    return (*block * 5, *[square] * 16, *network * 2)


def _weights(title: str, shapes: tuple[tuple[int, ...], ...], is_model: bool = False) -> Problem:
    """Convolutions with frozen norms, matrices with their biases, two stacked matrices, and a vector as replicas; all
    in float32, for a step in the checked dtype.
    """
    float32 = {"dtype": torch.float32}

    def make(maker: Maker) -> Inputs:
        made = {f"weight {i}": maker.normal(*shape, **float32) for i, shape in enumerate(shapes)}
        for i, shape in enumerate(shapes):
            if len(shape) == 2:
                made[f"bias {i}"] = maker.normal(shape[0], **float32)
            else:
                made |= {f"norm {i} {part}": maker.uniform(shape[0], **float32) + 0.5 for part in range(4)}
        # The empty tensor carries the dtype of the step.
        return {**made, "vector": maker.normal(CHANNELS, **float32), "step": maker.normal(0)}

    def recipes(inputs: Inputs) -> list[Recipe]:
        result: list[Recipe] = [Replicas(inputs["vector"])]
        for i, shape in enumerate(shapes):
            weight = inputs[f"weight {i}"]
            if len(shape) == 4:
                norm = FrozenNorm(*(inputs[f"norm {i} {part}"] for part in range(4)), 1e-5)
                result += [Weight((weight,), norm), Shift(norm)]
            else:
                result += [Weight((weight,)), Weight((inputs[f"bias {i}"],), copies=40)]
        last = inputs[f"weight {len(shapes) - 1}"]
        return [*result, Weight((last, last))]

    def run(inputs: Inputs, backend: str) -> list[Tensor]:
        return prepare_weights(recipes(inputs), inputs["step"].dtype, backend)

    trained = [f"weight {i}" for i in range(len(shapes))]
    trained += [f"bias {i}" for i, shape in enumerate(shapes) if len(shape) == 2]
    return Problem("prepare_weights", title, make, run, (*trained, "vector"), is_model=is_model)
