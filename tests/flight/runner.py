"""Runs the steps of a flight one after the other, and packs the results after each."""

import json
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flight.packing import cap, fits, launchable, pack
from flight.processes import Ended, run_whole
from flight.steps import Step

ROOT = Path(__file__).parent.parent.parent
LOGS = 12 << 20
"""Bytes of all logs together."""
ENOUGH = 0.25
"""Share of a step's limit that must remain for the step to start."""
KEPT = ("results/*/*", "training/*.json*", "training/*.png", "cache/checked/*.json")
"""Files of the working folder that come back as results; not the weights of the training."""
TABLE, LOG, REPORT, RESULTS, CACHE = "steps.json", "log.txt", "junit.xml", "results.tar.gz", "triton-cache.tar.gz"
SEPARATE_LOGS = {"environment": "environment.txt", "sanitizers": "sanitizer.txt"}
"""Step → file for its log; the other steps share `log.txt`."""
FILES = (TABLE, LOG, REPORT, RESULTS, CACHE, *SEPARATE_LOGS.values())
"""All files that may come back."""


@dataclass(frozen=True)
class Outcome:
    """The result of a step."""

    step: Step
    status: str
    """`done`, `failed` (exit status other than 0), `late` (killed at its limit) or `left out` (no time was left)."""
    limit: float = 0.0
    """Time limit in seconds."""
    ended: Ended | None = None
    """None: it was not started."""
    cut: int = 0
    """Bytes left out of its log."""

    def line(self) -> str:
        """The line of the table."""
        status = self.status
        if self.status == "failed":
            status += f", status {self.ended.status}"
        if self.ended and self.ended.survivors:
            status += f", {self.ended.survivors} of its processes did not end"
        seconds = f"{self.ended.seconds:.1f} of {self.limit:.0f} s" if self.ended else f"of {self.step.seconds:.0f} s"
        cut = f"; {self.cut:,} bytes of its log left out" if self.cut else ""
        return f"{self.step.name:<14} {seconds:>16}  {status}{cut}"

    def entry(self) -> dict[str, object]:
        """The entry of `steps.json`."""
        return {
            "step": self.step.name,
            "status": self.status,
            "exit status": self.ended and self.ended.status,
            "seconds": self.ended and round(self.ended.seconds, 2),
            "limit": round(self.limit or self.step.seconds, 2),
            "survivors": self.ended.survivors if self.ended else 0,
            "bytes of log left out": self.cut,
            "purpose": self.step.purpose,
            "command": shlex.join(self.step.command),
        }


class Flight:
    """Steps with a common time limit and one folder for the results."""

    def __init__(
        self, steps: Sequence[Step], out: Path, work: Path, environment: Mapping[str, str], limit: float, about: dict
    ) -> None:
        """
        Args:
            steps: the most important first.
            out: folder for the results, created if absent.
            work: empty folder for everything else: `logs`, and the files of `flight.steps.Setup.work`.
            environment: the environment of every step.
            limit: seconds for the whole flight.
            about: further entries of `steps.json`.
        """
        self.steps, self.out, self.work = steps, out, work
        self.environment, self.limit, self.about = environment, limit, about
        self.outcomes: list[Outcome] = []
        self.left_out: dict[str, str] = {}
        """File that did not come back → reason."""
        self._start, self._start_date, self._packing = time.monotonic(), time.time(), 0.0
        self._packed: dict[str, list] = {}
        for folder in (out, work / "logs", work / "results"):
            folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            # Left by an earlier flight.
            (out / name).unlink(missing_ok=True)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def run(self) -> list[Outcome]:
        """Run all steps for which there is time."""
        for step in self.steps:
            # Packing takes time too, about as much as the last time.
            remaining = self.limit - self.seconds - self._packing
            if remaining < ENOUGH * step.seconds:
                self.outcomes.append(Outcome(step, "left out"))
                continue
            print(f"{step.name}: {step.purpose}", flush=True)
            self.outcomes.append(self._run_step(step, min(step.seconds, remaining)))
            print(self.outcomes[-1].line(), flush=True)
            self.pack()
        self.pack()
        print(self.table(), flush=True)
        return self.outcomes

    def _run_step(self, step: Step, seconds: float) -> Outcome:
        log = self.work / "logs" / f"{step.name}.txt"
        ended = run_whole(step.command, seconds, log, self.environment, ROOT)
        status = "late" if ended.status is None else "failed" if ended.status else "done"
        return Outcome(step, status, seconds, ended, cap(log, LOGS // len(self.steps)))

    def pack(self) -> None:
        """Pack the results so far into the folder for them."""
        start = time.monotonic()
        self._collect_results()
        kept = [path for name in KEPT for path in self.work.glob(name)]
        self._pack_archive(RESULTS, kept, self.work)
        cache = self.work / "triton-cache"
        self._pack_archive(CACHE, launchable(cache), cache)
        logs = {target: self.work / "logs" / f"{step}.txt" for step, target in SEPARATE_LOGS.items()}
        for name, source in {**logs, REPORT: self.work / REPORT}.items():
            if source.exists():
                self._bring(source, name)
        self._write(LOG, self.table() + "".join(self._log(outcome) for outcome in self.outcomes))
        entries = [outcome.entry() for outcome in self.outcomes]
        times = {"limit": self.limit, "seconds": round(self.seconds, 1)}
        content = {**self.about, **times, "files left out": self.left_out, "steps": entries}
        self._write(TABLE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        self._packing = time.monotonic() - start

    def table(self) -> str:
        """One line for each step so far, and one for each file that does not come back."""
        lines = [outcome.line() for outcome in self.outcomes]
        lines += [f"{name} does not come back: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([*lines, f"{self.seconds:.1f} of {self.limit:.0f} s", ""])

    def _log(self, outcome: Outcome) -> str:
        path = self.work / "logs" / f"{outcome.step.name}.txt"
        if outcome.step.name in SEPARATE_LOGS or not path.exists():
            return ""
        return f"\n===== {outcome.line()}\n{path.read_text(errors='replace')}"

    def _collect_results(self) -> None:
        """Copy the result files that benchmarks wrote since the start."""
        for path in (ROOT / "benchmarks" / "results").glob("*/*"):
            target = self.work / "results" / path.parent.name / path.name
            if path.stat().st_mtime < self._start_date or path.suffix == ".part":
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)

    def _pack_archive(self, name: str, files: list[Path], root: Path) -> None:
        state = sorted((path, path.stat().st_mtime) for path in files)
        if state and self._packed.get(name) != state:
            pack(files, root, self.work / name)
            self._bring(self.work / name, name)
        self._packed[name] = state

    def _write(self, name: str, text: str) -> None:
        path = self.work / name
        path.write_text(text, encoding="utf-8")
        self._bring(path, name)

    def _bring(self, source: Path, name: str) -> None:
        reason = fits(source)
        self.left_out.pop(name, None)
        if reason is None:
            shutil.copyfile(source, self.out / name)
        else:
            earlier = " (the file there is from an earlier step)" if (self.out / name).exists() else ""
            self.left_out[name] = f"{reason}{earlier}"
