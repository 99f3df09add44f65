"""The files of results: `results/<device>/<benchmark>.json`."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from harness.machine import device_name, environment, is_null_gpu
from harness.result import Result, Work
from harness.show import console

RESULTS = Path(__file__).parents[1] / "results"


def write_results(name: str, settings: dict[str, str], results: list[Result], left_out: list[str]) -> Path | None:
    """Write all samples, to four digits, with the environment that `write` adds."""
    entries = []
    for result in results:
        rounded = {name: [float(f"{s:.4g}") for s in values] for name, values in result.seconds.items()}
        entries.append({**asdict(result), "seconds": rounded})
    return write(name, {"settings": settings, "left_out": left_out, "results": entries})


def write(name: str, content: dict) -> Path | None:
    """Write environment and content to `results/<device>/<name>.json`. Returns the path; on a null GPU None."""
    if is_null_gpu():
        return None
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **content}, indent=1, ensure_ascii=False)
    # One line per list of samples, not per sample.
    text = re.sub(r"\[[^][{}\"]*\]", lambda match: " ".join(match[0].split()), text)
    path = folder / f"{name}.json"
    path.with_suffix(".part").write_text(text + "\n")
    return path.with_suffix(".part").replace(path)


def read_results(path: Path) -> list[Result]:
    """The results in a file that `write_results` wrote."""
    entries = json.loads(path.read_text())["results"]
    return [Result(**{**entry, "work": entry["work"] and Work(**entry["work"])}) for entry in entries]


def say_written(path: Path | None, what_next: str = "") -> None:
    """Print the path that `write` returned, in one line."""
    line = "wrote no result file: null GPU" if path is None else f"wrote {path}{what_next}"
    console.print(line, highlight=False, soft_wrap=True)
