"""The benchmark of dropout bits times only correct answers."""

from ops import bits


def test_smoke(benchmark, monkeypatch, options, quick):
    monkeypatch.setattr(bits, "QUERIES", 20)
    problem = bits.Problem(1, "25×34")
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"PyTorch", "torch.compile of it"} <= set(result.seconds)
    # 850 keys are 14 tiles of two words.
    assert result.work.bytes == 4 * 8 * 28 * 20
