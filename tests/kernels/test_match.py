"""Linear assignment: every backend against scipy's optimum and brute force, on random and adversarial costs."""

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from conddetr.kernels import linear_assignment, native, operators

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

PROBLEMS = 5_000
"""Problems of each family and size: a hundred thousand in all."""
INTERPRETED = 8
"""Problems under Triton's interpreter, where each takes hundredths of a second."""


@pytest.fixture(params=["triton", "native"])
def backend(request) -> str:
    """Each hand-written implementation."""
    if request.param == "native" and native.NOT_LOADED is not None:
        pytest.skip(native.NOT_LOADED)
    return request.param


@pytest.fixture
def device(backend) -> torch.device:
    """CUDA if available; the CPU for the native kernel, which runs only there."""
    return torch.device("cuda" if torch.cuda.is_available() and backend != "native" else "cpu")


def spread(shape, rng):
    """Magnitudes from 1e-30 to 1e30, both signs."""
    return rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-30, 30, shape)


def forbidden(shape, rng):
    """A third of the pairs is forbidden; the diagonal never is, so an assignment exists."""
    cost = rng.normal(size=shape)
    cost[rng.random(shape) < 1 / 3] = np.inf
    for index in range(shape[1]):
        cost[:, index, index] = 100.0
    return cost


FAMILIES = {
    "normal": lambda shape, rng: rng.normal(size=shape),
    "few values, many ties": lambda shape, rng: rng.integers(-2, 3, shape),
    "all equal": lambda shape, rng: np.full(shape, 0.1),
    "product: long augmenting paths": lambda shape, rng: np.outer(
        np.arange(1, shape[1] + 1), np.arange(shape[2], 0, -1)
    ),
    "almost ties": lambda shape, rng: 1 + np.finfo(np.float32).eps * rng.integers(0, 4, shape),
    "huge range": spread,
    "denormal": lambda shape, rng: 1e-44 * rng.integers(-9, 9, shape),
    "largest floats": lambda shape, rng: rng.choice([-3.4e38, 3.4e38], shape),
    "forbidden pairs": forbidden,
    "one query wanted by all": lambda shape, rng: rng.random(shape) - 9 * (np.arange(shape[2]) == 1),
}


def make(family, problems, objects, queries):
    shape = (problems, objects, queries)
    cost = FAMILIES[family](shape, np.random.default_rng(0))
    return torch.from_numpy(np.broadcast_to(cost, shape).astype(np.float32))


def assert_optimal(cost, assignment, counts):
    """Check that assignments [P, Q] have each object once and cost as much as scipy's: cost [P, N, Q], counts [P]."""
    cost, assignment, counts = cost.double().numpy(), assignment.cpu().numpy(), counts.tolist()
    objects = np.arange(cost.shape[1])[:, None]
    is_pair = objects == assignment[:, None]
    assert (is_pair.sum(2) == (objects[:, 0] < np.array(counts)[:, None])).all()
    assert ((assignment >= -1) & (assignment < cost.shape[1])).all()
    for problem, pairs, count in zip(cost, is_pair, counts, strict=True):
        best = problem[linear_sum_assignment(problem[:count])]
        assert abs(math.fsum(problem[pairs]) - math.fsum(best)) <= 1e-12 * np.abs(best).sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("objects", "queries"), [(4, 6), (5, 5)])
def test_total_cost_equals_that_of_scipy(objects, queries, family, backend, device):
    is_interpreted = backend == "triton" and device.type == "cpu"
    problems = INTERPRETED if is_interpreted else PROBLEMS
    cost = make(family, problems, objects, queries)
    counts = torch.arange(problems, dtype=torch.int32) % objects + 1
    assert_optimal(cost, linear_assignment(cost.to(device), counts.to(device), backend), counts)


@pytest.mark.parametrize(("objects", "queries"), [(1, 300), (40, 300), (33, 33), (1, 1)])
def test_sizes_of_the_model(objects, queries, backend, device):
    cost = make("normal", 2, objects, queries)
    counts = torch.tensor([objects, objects // 2], dtype=torch.int32)
    assert_optimal(cost, linear_assignment(cost.to(device), counts.to(device), backend), counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_300_objects_and_300_queries(family, backend, device):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("takes minutes under the interpreter")
    cost, counts = make(family, 4, 300, 300), torch.full((4,), 300, dtype=torch.int32)
    assert_optimal(cost, linear_assignment(cost.to(device), counts.to(device), backend), counts)


EVERY = pytest.mark.parametrize("backend", ["eager", "triton", "native"], indirect=True)


@EVERY
def test_least_cost_by_brute_force(backend, device):
    cost = make("normal", 3, 3, 5).to(device)
    assignments = linear_assignment(cost, torch.full((3,), 3, dtype=torch.int32, device=device), backend)
    for problem, assignment in zip(cost.cpu().double(), assignments.cpu(), strict=True):
        orders = itertools.permutations(range(5), 3)
        best = min(sum(problem[row, query].item() for row, query in enumerate(order)) for order in orders)
        query = (assignment >= 0).nonzero()[:, 0]
        assert problem[assignment[query], query].sum().item() == pytest.approx(best, abs=1e-12)


@EVERY
def test_non_finite_costs_still_give_an_assignment(backend, device):
    inf, nan = float("inf"), float("nan")
    cost = torch.tensor(
        [
            [[nan, nan, nan], [nan, nan, nan]],  # any assignment is valid
            [[nan, 5.0, inf], [inf, 1.0, nan]],  # the first object must take an infinite cost
            [[-inf, 0.0, 9.0], [-1.0, nan, 3.0]],  # -inf outweighs every other cost
            [[inf, 1e-30, 2e-30], [inf, 3e-30, 1e-30]],  # unused infinite costs lose no precision
        ],
        device=device,
    )
    assignments = linear_assignment(cost, torch.full((4,), 2, dtype=torch.int32, device=device), backend).tolist()
    assert sorted(assignments[0]) == [-1, 0, 1]
    assert assignments[1][1] == 1
    assert sorted(assignments[1]) == [-1, 0, 1]
    assert assignments[2] == [0, -1, 1]
    assert assignments[3] == [-1, 0, 1]


@EVERY
def test_layers_share_the_counts_of_their_images(backend, device):
    cost = make("normal", 6, 3, 4).view(3, 2, 3, 4).to(device)
    assignments = linear_assignment(cost, torch.tensor([3, 1], dtype=torch.int32, device=device), backend)
    assert assignments.shape == (3, 2, 4)
    assert ((assignments >= 0).sum(-1).cpu() == torch.tensor([3, 1])).all()


@EVERY
def test_no_objects(backend, device):
    for capacity in (0, 2):
        cost, counts = torch.zeros(2, capacity, 5, device=device), torch.zeros(2, dtype=torch.int32, device=device)
        assert (linear_assignment(cost, counts, backend) == -1).all()


def test_more_objects_than_queries(backend, device):
    cost, counts = make("normal", 1, 4, 2), torch.tensor([4], dtype=torch.int32)
    # scipy gives each query an object; so does `auto` if reading the counts does not block the host.
    index, query = linear_sum_assignment(cost[0].numpy())
    for name in ("eager", "auto"):
        assert linear_assignment(cost, counts, name)[0, query].tolist() == index.tolist()
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"at most as many objects as queries \(2\), got 4"):
            linear_assignment(cost, counts, backend)
    # The operator itself does not check the counts. It clamps them, and the search ends.
    assignments = operators.of(backend).linear_assignment(cost.to(device), counts.to(device))
    assert sorted(assignments[0].tolist()) == [0, 1]


def test_repeats_are_equal(backend, device):
    cost = make("few values, many ties", 4, 4, 9).to(device)
    counts = torch.full((4,), 4, dtype=torch.int32, device=device)
    first, second = (linear_assignment(cost, counts, backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_threads_and_instruction_sets_give_the_same_assignment(backend, device):
    """Costs have few bits, so all sums are exact and the search is the same on every instruction set."""
    cost = make("few values, many ties", 96, 40, 300)
    counts = torch.arange(96, dtype=torch.int32) % 41
    expected, threads = linear_assignment(cost, counts, backend), torch.get_num_threads()
    level = importlib.import_module("conddetr._C").cpu_level()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear_assignment(cost, counts, backend), expected)
        for name in native.build_info()["cpu_levels"]:
            if importlib.import_module("conddetr._C").use_cpu_level(name):
                assert torch.equal(linear_assignment(cost, counts, backend), expected), name
    finally:
        torch.set_num_threads(threads)
        importlib.import_module("conddetr._C").use_cpu_level(level)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_every_dtype_of_the_native_kernel(backend, device):
    cost = make("normal", 50, 7, 20)
    counts = torch.full((50,), 7, dtype=torch.int32)
    for dtype in native.CPU_DTYPES:
        rounded = cost.to(dtype)
        assert_optimal(rounded, linear_assignment(rounded, counts, backend), counts)
    # The assignment is valid even if sums overflow or nearly do.
    huge = 1.7e308 * cost.double().sign()
    assignments = linear_assignment(huge, counts, backend)
    assert (assignments.sort().values[:, -7:] == torch.arange(7)).all()


def test_operator_registration(backend, device):
    cost, counts = make("normal", 2, 2, 3).to(device), torch.tensor([2, 1], dtype=torch.int32, device=device)
    torch.library.opcheck(operators.of(backend).linear_assignment.default, (cost, counts))


def test_errors():
    cost, counts = torch.zeros(2, 3, 4), torch.tensor([3, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cost: expected \[..., B, N, Q\], floating, got \(3, 4\) torch.float32"):
        linear_assignment(cost[0], counts)
    with pytest.raises(ValueError, match=r"counts: expected \(2,\) torch.int32, got \(2,\) torch.int64"):
        linear_assignment(cost, counts.long())
    with pytest.raises(ValueError, match=r"counts: expected from 0 to N = 3 objects, got \[4, 1\]"):
        linear_assignment(cost, torch.tensor([4, 1], dtype=torch.int32))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = counts.to(device)
    with pytest.raises(RuntimeError, match="at most 4096 queries, got 5000"):
        linear_assignment(torch.zeros(2, 3, 5000, device=device), counts, "triton")
    with pytest.raises(RuntimeError, match=r"take float32, float16 and bfloat16, not torch.float64"):
        linear_assignment(cost.double().to(device), counts, "triton")
