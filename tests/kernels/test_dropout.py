"""Dropout with ReLU or a residual add on CPUs: dropped and kept elements, gradients, repeatability."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from philox import philox

from conddetr.kernels import dropout_add, native, registry, relu_dropout

pytestmark = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
P = 0.3
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# One element, no multiple of a vector, no multiple of a thread's share, several threads.
SHAPES = [(1,), (7,), (3, 1023), (97, 1031)]


def operator(x, seed, residual=None, p=P, relu=False):
    return torch.ops.conddetr_native.dropout(x, residual, torch.tensor([seed]), p, relu)


def test_philox_as_published():
    # The test vector for zeros from Random123, the authors' library.
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_every_instruction_set_drops_the_same_elements(level):
    module = importlib.import_module("conddetr._C")
    before = module.cpu_level()
    if level not in module.build_info()["cpu_levels"] or not module.use_cpu_level(level):
        pytest.skip(f"this processor has no {level}")
    try:
        seed = 2**31 + 12345
        out = operator(torch.ones(4103, dtype=torch.float64), seed)
    finally:
        module.use_cpu_level(before)
    numbers = torch.tensor([number for counter in range(1026) for number in philox(seed, counter)])[:4103]
    dropped = (numbers >> 8).double() / 2**24 < torch.tensor(P, dtype=torch.float32).double()
    torch.testing.assert_close(out, (~dropped).double() / (1 - P), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_values_and_gradients(shape, dtype):
    x, trunk, upstream = (torch.randn(shape, dtype=dtype) for _ in range(3))
    x.requires_grad_(), trunk.requires_grad_()
    kept = operator(torch.ones(shape, dtype=dtype), 5) != 0
    # A single rounding: intermediate values are at least float32.
    wide = torch.promote_types(dtype, torch.float32)
    scaled, slope = (torch.where(kept, tensor.to(wide) / (1 - P), 0) for tensor in (x, upstream))
    added, slope = operator(x, 5, trunk), slope.to(dtype)
    torch.testing.assert_close(operator(x, 5), scaled.to(dtype))
    torch.testing.assert_close(operator(x, 5, relu=True), scaled.clamp(min=0).to(dtype))
    torch.testing.assert_close(added, (trunk + scaled).to(dtype))
    for actual, expected in (
        (torch.autograd.grad(added, (x, trunk), upstream), (slope, upstream)),
        (torch.autograd.grad(operator(x, 5, relu=True), x, upstream), (torch.where(x > 0, slope, 0),)),
    ):
        torch.testing.assert_close(actual, expected)


def test_gradcheck():
    x, trunk = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, trunk: operator(x, 1, trunk), (x, trunk))
    assert torch.autograd.gradcheck(lambda x: operator(x, 1, relu=True), (x,))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_dropped_and_mean(p):
    torch.manual_seed(0)
    count = 200_000
    out = relu_dropout(torch.ones(count), p)
    # Five standard deviations of a binomial share.
    assert abs((out == 0).double().mean().item() - p) < 5 * (p * (1 - p) / count) ** 0.5
    again = relu_dropout(torch.ones(count), p)
    both = ((out == 0) & (again == 0)).double().mean().item()
    assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / count) ** 0.5, "two calls are independent"


def test_equal_seeds_and_any_number_of_threads_give_the_same_bits():
    x, trunk, threads = torch.randn(300, 1031), torch.randn(300, 1031), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            torch.manual_seed(3)
            results.append(torch.stack([relu_dropout(x, P), dropout_add(x, trunk, P)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_without_dropout_it_is_the_plain_operation():
    x, trunk = torch.randn(5, 7), torch.randn(5, 7)
    for backend in ("auto", "native", "eager"):
        assert torch.equal(relu_dropout(x, 0.0, backend), x.relu())
        assert torch.equal(dropout_add(x, trunk, 0.0, backend), trunk + x)


def test_reference_is_pytorchs():
    x, trunk = torch.randn(50, 7), torch.randn(50, 7)
    for run, expected in (
        (lambda: relu_dropout(x, P, "eager"), lambda: F.dropout(x.relu(), P)),
        (lambda: dropout_add(x, trunk, P, "eager"), lambda: trunk + F.dropout(x, P)),
    ):
        torch.manual_seed(1)
        actual = run()
        torch.manual_seed(1)
        assert torch.equal(actual, expected())


def test_mixed_dtypes_strides_and_non_finite_values():
    branch, trunk = torch.randn(64, 30).bfloat16().t(), torch.randn(30, 64, requires_grad=True)
    branch.requires_grad_()
    out = dropout_add(branch, trunk, P)
    assert out.dtype == torch.float32
    branch_grad, trunk_grad = torch.autograd.grad(out.sum(), (branch, trunk))
    assert branch_grad.dtype == torch.bfloat16
    assert torch.equal(branch_grad != 0, out != trunk)
    assert (trunk_grad == 1).all()
    non_finite = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(100)
    out = relu_dropout(non_finite, P).view(100, 3)
    assert (out[:, 0].isnan() | (out[:, 0] == 0)).all()
    assert out[:, 0].isnan().any()
    assert ((out[:, 1] == float("inf")) | (out[:, 1] == 0)).all(), "a dropped infinity is zero"
    assert (out[:, 2] == 0).all()


def test_operator_registration():
    x, trunk = (torch.randn(4, 9, requires_grad=True) for _ in range(2))
    for residual, relu in ((None, True), (None, False), (trunk, False)):
        torch.library.opcheck(torch.ops.conddetr_native.dropout.default, (x, residual, torch.tensor([1]), P, relu))


def test_compiles_without_a_graph_break():
    x, trunk = (torch.randn(4, 64) for _ in range(2))
    compiled = torch.compile(lambda x: dropout_add(relu_dropout(x, P), trunk, P), fullgraph=True)
    torch.manual_seed(1)
    out = compiled(x)
    kept = out != trunk
    assert 0 < kept.sum() < (x > 0).sum()
    torch.testing.assert_close(out[kept], (trunk + x / (1 - P) ** 2)[kept])


def test_errors():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"p: expected a probability in \[0, 1\), got 1.0"):
        relu_dropout(x, 1.0)
    with pytest.raises(ValueError, match=r"x: expected a floating dtype, got torch.int64"):
        relu_dropout(torch.ones(3, dtype=torch.int64), P)
    with pytest.raises(ValueError, match=r"residual: expected \(3, 4\) on cpu like x, got \(4,\) on cpu"):
        dropout_add(x, x[0], P)
    with pytest.raises(registry.BackendError, match="no kernels of this backend"):
        dropout_add(x, x, P, "triton")
    with pytest.raises(RuntimeError, match="expected no residual with ReLU"):
        operator(x, 1, x, relu=True)
