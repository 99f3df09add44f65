"""Dropout before a residual add, with gradients, against plain PyTorch and torch.compile of it."""

from functools import partial

from conddetr.kernels import dropout_add
from harness.dropout import DropoutProblem, P
from harness.problem import Forward, Tensors, against_pytorch


class Problem(DropoutProblem):
    """One size of a residual branch and its trunk."""

    operation = "dropout_add"
    channels = 256
    leaves = ("x", "residual")

    def forwards(self) -> dict[str, Forward]:
        return against_pytorch(partial(dropout_add, p=P), ("native",), "eager")

    def exact_forward(self) -> Forward:
        """Without dropout."""
        return partial(dropout_add, p=0.0, backend="eager")

    def exact(self, inputs: Tensors) -> Tensors:
        """The trunk's gradient is left out: it is the gradient of the output, bit by bit."""
        answer = super().exact(inputs)
        del answer["residual"]
        return answer
