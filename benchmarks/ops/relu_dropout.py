"""ReLU and dropout, with gradients, against plain PyTorch and torch.compile of it."""

from functools import partial

from conddetr.kernels import relu_dropout
from harness.dropout import DropoutProblem, P
from harness.problem import Forward, against_pytorch


class Problem(DropoutProblem):
    """One size of a feed-forward network's hidden layer."""

    operation = "relu_dropout"
    channels = 2048
    leaves = ("x",)

    def forwards(self) -> dict[str, Forward]:
        return against_pytorch(partial(relu_dropout, p=P), ("triton", "native"), "eager")

    def exact_forward(self) -> Forward:
        """Without dropout."""
        return partial(relu_dropout, p=0.0, backend="eager")
