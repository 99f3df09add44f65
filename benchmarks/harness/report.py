"""Plot every result file, and write the tables of all files into `README.md` of their folder.

    python benchmarks/run.py report [--results DIR]

Charts are beside the files: `results/<device>/<name>.png`. Charts and tables show only what is in the files.
"""

import json
import math
import textwrap
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from harness.command import command
from harness.refusals import OURS
from harness.result import Result
from harness.show import console, milliseconds, part_rows, spread
from harness.store import RESULTS, read_results

PAGE = "README.md"
"""The page of tables, in the folder of results."""
HEAD = """# Results

`python benchmarks/run.py report` writes this page from the result files beside it. [How it is measured](../README.md).
"""


def draw(path: Path) -> Path:
    """One panel per problem: median, 10th to 90th percentile, and the floor as a dashed line."""
    results = read_results(path)
    columns = min(3, len(results))
    names = list(dict.fromkeys(name for result in results for name in result.seconds))
    lines = math.ceil(len(results) / columns)
    size = (2.0 + 4.0 * columns, 0.4 + (0.8 + 0.2 * len(names)) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
    for axis, result in zip(axes.flat, results, strict=False):
        _draw_problem(axis, result, names)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    floor = "; dashed: the floor" if any(result.work for result in results) else ""
    parts = "; shades: parts of a step, see the legend" if any(result.parts for result in results) else ""
    figure.supxlabel(f"milliseconds: median, 10th to 90th percentile{floor}{parts}", fontsize=8)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return target


def _draw_problem(axis: plt.Axes, result: Result, names: list[str]) -> None:
    for name, values in result.seconds.items():
        middle, (low, high) = 1e3 * median(values), (1e3 * value for value in spread(values))
        color = "tab:orange" if name.startswith(OURS) else "tab:blue"
        row = names.index(name)
        axis.barh(row, middle, xerr=[[middle - low], [high - middle]], color=color, ecolor="0.2", capsize=2)
        _draw_parts(axis, row, middle, result.parts.get(name, {}))
    for name in result.refused.keys() & set(names):
        where = {"transform": axis.get_yaxis_transform(), "ha": "center", "va": "center"}
        axis.text(0.5, names.index(name), "refused", fontsize=7, color="0.4", **where)
    if result.work:
        axis.axvline(1e3 * result.work.floor, color="black", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(textwrap.fill(result.title, 50), fontsize=8)
    axis.tick_params(labelsize=7)


def _draw_parts(axis: plt.Axes, row: int, length: float, parts: dict[str, float]) -> None:
    """A bar of this length, divided in the proportions of the parts, each in a darker shade."""
    left, total = 0.0, sum(parts.values())
    for number, (name, seconds) in enumerate(parts.items()):
        width = length * seconds / total
        shade = (0.0, 0.0, 0.0, 0.6 * number / len(parts))
        axis.barh(
            row, width, left=left, color=shade, edgecolor="white", linewidth=0.5, label=name if row == 0 else None
        )
        left += width
    if parts and row == 0:
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1))


def files(folder: Path) -> list[Path]:
    """Files of one device with times that a bar chart shows. `paper` is no device and has none."""
    if folder.name == "paper":
        return []
    excluded = ("tune", "data", "evaluation", "scaling", "checkpoint")
    # After a hyphen come options of the same benchmark.
    return sorted(path for path in folder.glob("*.json") if path.stem.split("-")[0] not in excluded)


def markdown(results: Path) -> str:
    """The page: one section per device, one table per file."""
    sections = [HEAD.strip()]
    for folder in sorted(path for path in results.iterdir() if path.is_dir() and files(path)):
        sections.append(f"## {json.loads(files(folder)[0].read_text())['environment']['device']}")
        sections += [_file_section(path) for path in files(folder)]
    return "\n\n".join(sections) + "\n"


def _file_section(path: Path) -> str:
    """Conditions, table, refusals and chart of one file."""
    content, results = json.loads(path.read_text()), read_results(path)
    environment = content["environment"]
    conditions = [f"{key} {value}" for key, value in environment.items() if key != "device" and value != "none"]
    lines = [f"### `{path.stem}`", "", f"Median milliseconds. {', '.join(conditions)}.", "", *_table(results), ""]
    for result in (result for result in results if result.parts):
        lines += [f"Milliseconds of each part, from separate steps: {result.title}.", "", *_parts_table(result), ""]
    refused: dict[str, list[str]] = {}
    for result in results:
        for name, reason in result.refused.items():
            refused.setdefault(reason, []).append(name)
    lines += [f"- {'; '.join(dict.fromkeys(names))}: {reason}" for reason, names in refused.items()]
    if content["left_out"]:
        lines.append(f"- {len(content['left_out'])} problems did not start in the time given.")
    picture = f"{path.parent.name}/{path.stem}.png"
    return "\n".join([*lines, "", f"![{path.stem} on {environment['device']}]({picture})"]).replace("\n\n\n", "\n\n")


def _table(results: list[Result]) -> list[str]:
    """Rows: problems. Columns: implementations, ours over the best peer, the fastest over the floor."""
    names = list(dict.fromkeys(name for result in results for name in result.seconds))
    has_ours, has_floor = any(name.startswith(OURS) for name in names), any(result.work for result in results)
    headings = ["problem", *names] + ["ours vs best peer"] * has_ours + ["fastest, × floor"] * has_floor
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    for result in results:
        medians = {name: median(values) for name, values in result.seconds.items()}
        best = min(medians.values(), default=math.nan)
        cells = [milliseconds(medians[name]) if name in medians else "–" for name in names]
        cells = [f"**{cell}**" if medians.get(name) == best else cell for name, cell in zip(names, cells, strict=True)]
        if has_ours:
            ours = [value for name, value in medians.items() if name.startswith(OURS)]
            peers = [value for name, value in medians.items() if not name.startswith(OURS)]
            cells.append(f"{min(peers) / min(ours):.2f}×" if ours and peers else "–")
        if has_floor:
            cells.append(f"{best / result.work.floor:.1f}" if result.work and medians else "–")
        lines.append("| " + " | ".join([result.title, *cells]) + " |")
    return lines


def _parts_table(result: Result) -> list[str]:
    headings, rows = part_rows(result)
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def put(page: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two lines of a page.

    Raises:
        SystemExit: the page does not have both lines.
    """
    content = page.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise SystemExit(f"{page}: expected the lines {begin!r} and {end!r}, around the tables.")
    before, after = content.split(begin)[0], content.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main(words: list[str]) -> None:
    """Plot the charts and write the page."""
    parser = command("report", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of one folder per device")
    options = parser.parse_args(words)
    for path in (path for folder in sorted(options.results.iterdir()) for path in files(folder)):
        console.print(f"plotted {draw(path)}", highlight=False, soft_wrap=True)
    page = options.results / PAGE
    page.write_text(markdown(options.results), encoding="utf-8")
    console.print(f"wrote {page}", highlight=False, soft_wrap=True)
