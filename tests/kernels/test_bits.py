"""Random bits with a given probability: each against Philox in plain Python, and their share."""

import pytest
import torch
from philox import philox

from conddetr.kernels import drawn_probability, dropout_bits, operators, registry
from conddetr.kernels.bits.reference import unpacked

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

SEED = (1 << 40) + 12345


def numbers(seed, words):
    """[words, 32]: the 16-bit number behind each bit."""
    rows = []
    for word in range(words):
        random = [number for call in range(4) for number in philox(seed, 4 * word + call)]
        rows.append([sum((random[bit] >> lane & 1) << bit for bit in range(16)) for lane in range(32)])
    return torch.tensor(rows)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.75, 1 - 2**-20])
def test_each_bit_is_a_comparison_of_16_bits(p, backend, device):
    threshold = min(round(p * 65536), 65535)
    for name in (backend, "eager"):
        words = dropout_bits(torch.tensor([SEED], device=device), (3, 1, 7), p, name)
        assert words.shape == (3, 1, 7)
        assert words.dtype == torch.int32
        assert torch.equal(unpacked(words.cpu()).view(21, 32), numbers(SEED, 21) >= threshold)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 513, 5000])
def test_every_backend_gives_the_same_bits(count, backend, device):
    seed = torch.tensor([-7], device=device)
    actual, expected = (dropout_bits(seed, (count,), 0.3, name) for name in (backend, "eager"))
    assert torch.equal(actual, expected)


def test_any_number_of_threads_gives_the_same_bits():
    seed, before = torch.tensor([3]), torch.get_num_threads()
    reason = registry.why_not("native", seed.device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(dropout_bits(seed, (20_000,), 0.1, "native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_share_and_independence(backend, device):
    """256,000 bits: five standard deviations of a share of 0.1 are 0.003."""
    kept = unpacked(dropout_bits(torch.tensor([11], device=device), (8000,), 0.1, backend)).double().cpu()
    assert kept.mean().item() == pytest.approx(1 - drawn_probability(0.1), abs=0.003)
    assert ((kept.mean(0) - 0.9).abs() < 0.017).all()
    for shifted in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(5, 1)):
        both = ((1 - kept) * (1 - shifted)).mean().item()
        assert both == pytest.approx(0.01, abs=0.0015)
    reseeded = unpacked(dropout_bits(torch.tensor([12], device=device), (8000,), 0.1, backend)).double().cpu()
    assert ((1 - kept) * (1 - reseeded)).mean().item() == pytest.approx(0.01, abs=0.0015)


def test_probability_is_rounded_to_the_nearest_multiple():
    assert drawn_probability(0.5) == 0.5
    assert abs(drawn_probability(0.1) - 0.1) <= 2**-17
    assert drawn_probability(2**-18) == 0
    assert drawn_probability(1 - 2**-30) == 1 - 2**-16


def test_registration(backend, device):
    name = "triton" if backend == "auto" else backend
    operator = operators.of(name).dropout_bits.default
    torch.library.opcheck(operator, (torch.tensor([5], device=device), 40, 6554))


def test_compiled_with_any_shape(backend, device):
    seed = torch.tensor([5], device=device)
    compiled = torch.compile(lambda x: dropout_bits(seed, (x.shape[0], 3), 0.1, backend), dynamic=True, backend="eager")
    for size in (2, 7):
        assert torch.equal(compiled(torch.zeros(size)), dropout_bits(seed, (size, 3), 0.1, "eager"))


@pytest.mark.parametrize(
    ("seed", "p", "message"),
    [
        (torch.zeros(1), 0.1, r"seed: expected shape \(1,\) and dtype torch.int64, got \(1,\) and torch.float32"),
        (torch.zeros(2, dtype=torch.int64), 0.1, r"seed: expected shape \(1,\) .*, got \(2,\)"),
        (torch.zeros(1, dtype=torch.int64), 1.0, r"p: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_errors(seed, p, message):
    with pytest.raises(ValueError, match=message):
        dropout_bits(seed, (4,), p)
