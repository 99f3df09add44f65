"""The file of predictions: kernels, peers and whole problems, with their versions."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu_model import figures
from gpu_model.figures import Figures

FOLDER = Path(__file__).parents[1] / "predictions"
NOTE = (
    "Predicted from machine code by benchmarks/run.py predict, which says how and what is left out. Nothing is "
    "measured. Clocks are those of a quarter of an H100's multiprocessor for 1024 scores, seconds those of an H100."
)


@dataclass(frozen=True)
class Row:
    """One kernel."""

    implementation: str
    variant: str
    """Its computation, independent of its settings: `32 channels, separable, dropout`."""
    figures: Figures

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Key by which results before and after a change are compared."""
        return self.implementation, self.figures.name, self.variant, self.figures.architecture


@dataclass(frozen=True)
class Part:
    """One launch, or one operator of which only the bytes are known."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """Predicted time of one problem by one implementation."""

    implementation: str
    grid: str
    batch: int
    padded: bool
    backward: bool
    """With dropout; forward alone is without dropout."""
    seconds: float
    floor: float
    """Minimal seconds of any implementation."""
    launches: int
    parts: tuple[Part, ...]

    @property
    def problem(self) -> tuple[bool, bool, str, int]:
        """The problem without the implementation."""
        return self.backward, self.padded, self.grid, self.batch

    @property
    def key(self) -> tuple:
        """Key by which results before and after a change are compared."""
        return *self.problem, self.implementation


@dataclass(frozen=True)
class Predictions:
    """Contents of the file."""

    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Triton, nvcc and PyTorch, and of the PyTorch whose kernels the peers are."""
    kernels: tuple[Row, ...] = ()
    peers: tuple[Figures, ...] = ()
    problems: tuple[Prediction, ...] = ()

    def figures(self) -> dict[tuple, Figures]:
        """Figures by keys."""
        return {row.key: row.figures for row in self.kernels}


def read(path: Path) -> Predictions:
    """Read a file of `write`; empty predictions if there is no file."""
    if not path.exists():
        return Predictions()
    stored = json.loads(path.read_text())
    problems = (
        Prediction(**{**entry, "parts": tuple(Part(*part) for part in entry["parts"])}) for entry in stored["problems"]
    )
    return Predictions(
        commit=stored["commit"],
        versions=stored["versions"],
        kernels=tuple(
            Row(entry.pop("implementation"), entry.pop("variant"), figures.read(entry)) for entry in stored["kernels"]
        ),
        peers=tuple(map(figures.read, stored["peers"])),
        problems=tuple(problems),
    )


def write(path: Path, predictions: Predictions) -> None:
    """Write the file: one line per kernel and problem, numbers to four digits."""
    kernels = [
        {"implementation": r.implementation, "variant": r.variant, **asdict(r.figures)} for r in predictions.kernels
    ]
    problems = [
        {**asdict(problem), "parts": [(part.name, part.seconds) for part in problem.parts]}
        for problem in predictions.problems
    ]
    lists = {"kernels": kernels, "peers": map(asdict, predictions.peers), "problems": problems}
    head = {"note": NOTE, "commit": predictions.commit, "versions": predictions.versions}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    lines += [f"{json.dumps(name)}: [\n{_listed(items)}\n]" for name, items in lists.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _listed(items: Iterable[dict]) -> str:
    return ",\n".join(f"  {json.dumps(_rounded(item), ensure_ascii=False)}" for item in items)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
