"""The null GPU's counts: which library calls are launches, and what the totals and the log contain."""

import ctypes

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from null_gpu.counts import Launch, counted, totals
from null_gpu.counts import launched as log

ONE = (1, 1)


def numbers(*shape):
    return torch.zeros(shape, device="cuda", dtype=torch.bfloat16)


def launched(operation):
    """Launches by kernel name in the second call; the first creates handles."""
    operation()
    with counted() as counts:
        operation()
    assert counts.launches == counts.kernels.total()
    return dict(counts.kernels)


def test_product_is_one_launch():
    """cublasLt describes a product in a dozen calls, then computes it in one."""
    x, weight, bias = numbers(300, 64), numbers(128, 64), numbers(128)
    assert launched(lambda: F.linear(x, weight, bias)) == {"cublasLtMatmul": 1}
    assert launched(lambda: x @ weight.t()) == {"cublasGemmEx": 1}
    assert launched(lambda: torch.mv(weight.float(), x[0].float()))["cublasSgemv_v2"] == 1


def test_convolution_is_one_launch_for_each_result():
    x, weight, bias = numbers(2, 64, 16, 16), numbers(64, 64, 3, 3), numbers(64)
    window = (ONE, ONE, ONE, 1)
    convolutions = (
        lambda: torch.cudnn_convolution(x, weight, ONE, ONE, ONE, 1, False, False, False),
        lambda: torch.cudnn_convolution_relu(x, weight, bias, *window),
        lambda: torch.cudnn_convolution_add_relu(x, weight, x, 1.0, bias, *window),
    )
    for convolution in convolutions:
        assert launched(convolution) == {"cudnn": 1}
    backward = torch.ops.aten.convolution_backward
    gradients = (x, x, weight, None, ONE, ONE, ONE, False, (0, 0), 1, [True, True, False])
    assert launched(lambda: backward(*gradients)) == {"cudnn": 2}


def test_cudnn_batch_norm_is_one_launch():
    x, weight = numbers(2, 64, 16, 16).float(), torch.ones(64, device="cuda")
    options = (None, None, True, 0.1, 1e-5)
    assert launched(lambda: torch.ops.aten.cudnn_batch_norm(x, weight, weight, *options)) == {
        "cudnnBatchNormalizationForwardTrainingEx": 1
    }


def clear(tensor):
    """Clear memory as some PyTorch releases do in `zero_`; others launch a kernel."""
    assert ctypes.CDLL(None).cudaMemset(ctypes.c_void_p(tensor.data_ptr()), 0, ctypes.c_size_t(tensor.nbytes)) == 0


def test_clearing_memory_is_counted_separately():
    x = numbers(1 << 12)
    with counted() as counts:
        clear(x)
    assert (counts.memsets, counts.launches) == (1, 0)


def test_totals_are_those_of_the_block():
    x = numbers(8)
    with counted() as counts:
        x + 1
        x.cpu()
        clear(x)
        result = totals()
    assert result == (counts.launches, counts.waits, counts.from_device + counts.memsets) == (1, 1, 2)


@triton.jit
def fill_kernel(out, size: tl.constexpr):
    tl.store(out + tl.program_id(0) * size + tl.arange(0, size), 1.0)


def test_launches_are_logged_in_order_with_their_grids():
    x = numbers(1 << 10)
    fill_kernel[(4, 2)](x, 128, num_warps=2)
    with counted():
        clear(x)
        fill_kernel[(4, 2)](x, 128, num_warps=2)
        torch.mm(x.view(32, 32), x.view(32, 32))
        assert log() == [
            Launch("memset", (0, 0, 0), (0, 0, 0), x.nbytes),
            Launch("fill_kernel", (4, 2, 1), (64, 1, 1), 0),
            Launch("cublasGemmEx", (0, 0, 0), (0, 0, 0), 0),
        ]
    with counted():
        assert log() == []
