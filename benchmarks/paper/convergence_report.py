"""Report of `convergence.py` from its result file: table, curves, and a page."""

import json
import os
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.table import Table

from harness import report
from paper import tables

METRICS = ("AP", "AP50")
DOCS = Path(__file__).parents[2] / "docs" / "paper.md"
PAPER_AP = {row.model: row.ap[0] for row in tables.TABLES[list(tables.TABLES)[2]]}
"""Published AP of Table 3; its full form is Conditional DETR itself."""
FAILED = -1.0
"""Stands for the AP50 of a failed run."""


def evaluated(run: dict) -> list[dict[str, float]]:
    """The points of a curve that have AP."""
    return [point for point in run["curve"] if "AP" in point]


def steps_to(runs: list[dict], metric: str, target: float) -> int | None:
    """First evaluated step at which the mean of a metric over the runs reaches a target; None: never."""
    for points in zip(*map(evaluated, runs), strict=True):
        if mean(point[metric] for point in points) >= target:
            return points[0]["step"]
    return None


def compared(runs: list[dict]) -> dict[str, list[dict]]:
    """Arm → its runs at the rate that was best with the first seed, without failed ones."""
    arms: dict[str, list[dict]] = {}
    for run in runs:
        scores = rate_scores(run["arm"], runs)
        if "failed" not in run and scores and run["lr"] == max(scores, key=scores.get):
            arms.setdefault(run["arm"], []).append(run)
    return arms


def rate_scores(arm: str, runs: list[dict]) -> dict[float, float]:
    """Learning rate → final AP50 of the arm's training with the first seed; negative if that failed."""
    first = [run for run in runs if run["seed"] == 0 and run["arm"] == arm]
    return {run["lr"]: FAILED if "failed" in run else run["curve"][-1]["AP50"] for run in first}


def final(group: list[dict], metric: str) -> list[float]:
    """Final value of a metric in each run."""
    return [run["curve"][-1][metric] for run in group]


def rows(runs: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: each arm's final AP, mean and range over seeds, and its steps to half of the best AP50."""
    arms = compared(runs)
    best = max(mean(final(group, "AP50")) for group in arms.values())
    headings = ["model", "lr", "seeds", "steps", "seconds", *METRICS, f"steps to AP50 {50 * best:.1f}"]
    lines = []
    for name, group in arms.items():
        scores = [[100 * value for value in final(group, metric)] for metric in METRICS]
        cells = [f"{mean(values):.1f} ({min(values):.1f}–{max(values):.1f})" for values in scores]
        reached = steps_to(group, "AP50", best / 2)
        counts = (str(len(group)), str(group[0]["curve"][-1]["step"]), f"{mean(final(group, 'seconds')):.0f}")
        lines.append([name, f"{group[0]['lr']:g}", *counts, *cells, "never" if reached is None else str(reached)])
    return headings, lines


def table(runs: list[dict]) -> Table:
    """`rows` for the terminal."""
    headings, lines = rows(runs)
    rendered = Table(title="AP in percent, mean (minimum–maximum over seeds); last column: half of the best")
    for heading in headings:
        rendered.add_column(heading, justify="left" if heading == "model" else "right")
    for line in lines:
        rendered.add_row(*line)
    return rendered


def draw(path: Path, runs: list[dict]) -> Path:
    """Plot AP and AP50 against steps and seconds: mean over seeds, with a band from minimum to maximum."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharey="row", sharex="col")
    for row, metric in zip(axes, METRICS, strict=True):
        for axis, unit in zip(row, ("step", "seconds"), strict=True):
            for name, group in compared(runs).items():
                points = list(zip(*map(evaluated, group), strict=True))
                x = [mean(point[unit] for point in at) for at in points]
                y = [[100 * point[metric] for point in at] for at in points]
                line = axis.plot(x, [mean(values) for values in y], marker="o", markersize=3, label=name)
                band = [min(values) for values in y], [max(values) for values in y]
                axis.fill_between(x, *band, color=line[0].get_color(), alpha=0.2)
            axis.set_ylabel(f"{metric}, percent")
            axis.grid(alpha=0.3)
            axis.set_ylim(0, 100)
    axes[1, 0].set_xlabel("training steps")
    axes[1, 1].set_xlabel("seconds of training")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{path.stem}: mean and range over seeds", fontsize=10)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return target


def rate_rows(plan: dict, runs: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: AP50 of the first seed at every learning rate, and the chosen rate."""
    headings = ["model", *(f"{rate:g}" for rate in plan["rates"]), "chosen"]
    lines = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        scores = rate_scores(arm, runs)
        if len(scores) < len(plan["rates"]):
            continue  # It uses the rate of its family.
        best = max(scores, key=scores.get)
        is_edge = best in (min(plan["rates"]), max(plan["rates"]))
        cells = ["failed" if scores[rate] == FAILED else f"{100 * scores[rate]:.1f}" for rate in plan["rates"]]
        lines.append([arm, *cells, f"{best:g}" + ", at the edge: a rate beyond it may be better" * is_edge])
    return headings, lines


def ratios(arms: dict[str, list[dict]]) -> list[str]:
    """Sentences on the steps that the longest DETR needs, relative to Conditional DETR."""
    slow_name = max((name for name in arms if name.startswith("DETR")), key=lambda n: _steps(arms[n]), default="")
    if not slow_name or "Conditional DETR" not in arms:
        return []
    fast, slow = arms["Conditional DETR"], arms[slow_name]
    goals = {
        "the smaller of both at their ends": min(mean(final(group, "AP50")) for group in (fast, slow)),
        "Conditional DETR at its end": mean(final(fast, "AP50")),
    }
    return [_ratio(label, goal, fast, slow, slow_name) for label, goal in goals.items()]


def _ratio(label: str, goal: float, fast: list[dict], slow: list[dict], slow_name: str) -> str:
    few, many = steps_to(fast, "AP50", goal), steps_to(slow, "AP50", goal)
    begin = f"AP50 {100 * goal:.1f} ({label}): Conditional DETR after {few} steps, {slow_name} "
    if many is None:
        return begin + f"not in {_steps(slow)}: more than {_steps(slow) / few:.1f} times as many."
    # A goal that is reached at the first evaluation may have been reached before it.
    least = "at least " * (few == evaluated(fast[0])[0]["step"])
    return begin + f"after {many}: {least}{many / few:.1f} times as many."


def _steps(group: list[dict]) -> int:
    return group[0]["curve"][-1]["step"]


def variant_rows(arms: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: arms by final AP, with the published AP of the paper's Table 3 and its rank."""
    published = {name: PAPER_AP.get(name.replace("Conditional DETR", "CSQ")) for name in arms}
    order = sorted((value for value in published.values() if value is not None), reverse=True)
    lines = []
    for name in sorted(arms, key=lambda name: -mean(final(arms[name], "AP"))):
        value = published[name]
        cells = ("–", "–") if value is None else (f"{value:.1f}", str(order.index(value) + 1))
        lines.append([name, f"{100 * mean(final(arms[name], 'AP')):.1f}", *cells])
    return ["model", "AP", "AP on COCO, paper", "place there"], lines


def markdown(content: dict, picture: str) -> str:
    """The page of a result file.

    Args:
        content: of the file.
        picture: link from the page to the chart of the curves.
    """
    plan, runs = content["plan"], content["runs"]
    arms = compared(runs)
    environment = next(iter(arms.values()))[0]["environment"]
    images = (plan["coco_path"] and "images of COCO's layout") or f"{plan['train_images']} synthetic images"
    parts = [
        f"{plan['epochs']} epochs of {images}, batches of {plan['batch_size']}, learning rate divided by ten after "
        f"{plan['lr_drop']}. {environment['device']}, torch {environment['torch']}, commit {environment['commit']}. "
        "AP in percent, mean and range over seeds at the end; seconds of training, evaluation left out.",
        _lines(*rows(runs)),
        "\n".join(f"- {line}" for line in ratios(arms)),
        "Learning rates, by AP50 at the end of the first seed's training:",
        _lines(*rate_rows(plan, runs)),
    ]
    if len(arms) > 2:
        parts += ["By AP, with the paper's order of those that its Table 3 has:", _lines(*variant_rows(arms))]
    failed = [
        f"- failed: {run['arm']}, {run['lr']:g}, seed {run['seed']}: {run['failed']}" for run in runs if "failed" in run
    ]
    parts += ["\n".join(failed), f"![AP and AP50 against steps and seconds]({picture})"]
    return "\n\n".join(part for part in parts if part)


def _lines(headings: list[str], lines: list[list[str]]) -> str:
    head = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])


def publish(path: Path, docs: Path) -> list[Path]:
    """Plot a result file, write its page beside it, and into the documentation if that has its markers."""
    content = json.loads(path.read_text())
    picture, page = draw(path, content["runs"]), path.with_suffix(".md")
    page.write_text(f"# {path.stem}\n\n{markdown(content, picture.name)}\n", encoding="utf-8")
    begin, end = markers(path.stem)
    if begin in docs.read_text(encoding="utf-8"):
        report.put(docs, begin, end, markdown(content, os.path.relpath(picture, docs.parent)))
    return [picture, page]


def markers(stem: str) -> tuple[str, str]:
    """The lines around a result file's page in the documentation."""
    return f"<!-- written by benchmarks/convergence.py: {stem} -->", f"<!-- end of {stem} -->"
