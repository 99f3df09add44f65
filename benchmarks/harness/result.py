"""What is known of one problem after its benchmark: times, memory, refusals, and the least that it needs."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """The least that a problem needs, padding not counted; what rates and floors are computed from."""

    flops: float
    """Multiplications and additions of the matrix products as the paper writes them: what TFLOP/s counts."""
    bytes: float
    """Every input read once, every output written once."""
    floors: dict[str, float]
    """Resource → seconds that it needs at the least; the largest is the floor."""

    @property
    def floor(self) -> float:
        """Seconds under which no implementation can come."""
        return max(self.floors.values())


@dataclass(frozen=True)
class Result:
    """One problem, with all that was measured of it."""

    title: str
    seconds: dict[str, list[float]]
    """Implementation → one sample per call."""
    work: Work | None = None
    peak_extra_bytes: dict[str, int] = field(default_factory=dict)
    """Implementation → device memory at its highest, less what was there before the call; empty on a CPU."""
    refused: dict[str, str] = field(default_factory=dict)
    """Implementation → why it was not timed."""
    images: int = 0
    """In each call, where a call is a step of a whole model; 0: it is not."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Implementation → part of a step → seconds, measured apart from `seconds`."""
    captured: list[str] = field(default_factory=list)
    """Implementations whose calls replay a CUDA graph: their memory is that of the capture, which a replay reuses."""
