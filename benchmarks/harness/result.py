"""Result of one problem: times, memory, refusals, and its minimal work."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """Minimal work of a problem, without padding; rates and floors are computed from it."""

    flops: float
    """Multiplications and additions of the matrix products as the paper writes them; TFLOP/s counts these."""
    bytes: float
    """Every input read once, every output written once."""
    floors: dict[str, float]
    """Resource → minimal seconds; the largest is the floor."""

    @property
    def floor(self) -> float:
        """Minimal seconds of any implementation."""
        return max(self.floors.values())


@dataclass(frozen=True)
class Result:
    """One problem and its measurements."""

    title: str
    seconds: dict[str, list[float]]
    """Implementation → one sample per call."""
    work: Work | None = None
    peak_extra_bytes: dict[str, int] = field(default_factory=dict)
    """Implementation → peak memory in bytes, less what was allocated before the call; empty if it was not measured."""
    refused: dict[str, str] = field(default_factory=dict)
    """Implementation → why it was not timed."""
    images: int = 0
    """Per call, if a call is a step of a whole model; else 0."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Implementation → part of a step → seconds, measured separately from `seconds`."""
    captured: list[str] = field(default_factory=list)
    """Implementations whose calls replay a CUDA graph: their memory is that of the capture, which a replay reuses."""
