"""How long the attention kernels should take on an H100, predicted from their machine code without a GPU.

python benchmarks/predict.py --kernel backward_key_kernel --tiles 64,64,4,3 32,64,4,2    # one with some settings
"""

import argparse
import sys

from gpu_model import cuda_code, figures, triton_code
from gpu_model.hot_path import HotPathError
from rich.console import Console
from rich.table import Table

from conddetr.kernels.attn.triton import Tiles

console = Console(width=max(170, Console().width))
"""Wide enough for every column: on a narrower terminal lines wrap."""


def tiles(text: str) -> Tiles:
    """`64,64,4,3`: queries, keys, warps, stages."""
    return Tiles(*map(int, text.split(",")))


def show(found: list[figures.Figures]) -> None:
    """A row for each kernel."""
    table = Table(title="Kernels, per 1024 scores; clocks are predicted, of a quarter of a multiprocessor")
    for name in ("kernel", "form", "sm", "registers", "stack", "shared", "blocks", "instructions", "needs, clocks",
                 "one block", "full", "× floor"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("kernel", "form", "needs, clocks") else "right")
    for one in found:
        needs = sorted(one.needs.items(), key=lambda item: -item[1])[:4]
        cells = (one.architecture, one.registers, one.stack, one.shared, one.blocks, round(one.instructions))
        table.add_row(
            one.name, one.form, *map(str, cells), ", ".join(f"{unit} {clocks:.0f}" for unit, clocks in needs),
            number(one.alone), number(one.full), number(one.ratio, 2),
        )  # fmt: skip
    console.print(table)


def number(value: float | None, digits: int = 0) -> str:
    """– for what is not known."""
    return "–" if value is None else f"{value:,.{digits}f}"


def of_cuda(options: argparse.Namespace) -> list[figures.Figures]:
    """The kernels of csrc/attn, or one of them."""
    found = cuda_code.kernels(options.architecture, not options.no_dropout)
    return [figures.of(kernel) for name, kernel in found.items() if options.kernel in (None, name)]


def explore(options: argparse.Namespace) -> list[figures.Figures]:
    """One kernel with each of some settings."""
    found = []
    for setting in options.tiles or [None]:
        job = triton_code.job(
            options.kernel, options.architecture, tiles=setting, dropout=not options.no_dropout, width=options.width,
            separable=not options.dense, dtype=options.dtype, options=dict(options.set),
        )  # fmt: skip
        try:
            kernel = triton_code.compiled(job, options.architecture)
            found.append(figures.of(kernel))
        except HotPathError as error:
            console.print(f"{job.kernel}, {setting}: {error}", style="red", markup=False)
            continue
        if options.listing:
            for instruction in kernel.path.main:
                console.print(
                    f"{instruction.address:05x} {instruction.control.stall:2} {instruction.predicate:5} "
                    f"{instruction.operation} {instruction.operands}",
                    markup=False, highlight=False,
                )  # fmt: skip
        counts = ", ".join(f"{name} {count:.0f}" for name, count in found[-1].by_name.items())
        console.print(f"{kernel.name}, {kernel.form}: {counts}", soft_wrap=True, highlight=False)
    return found


def constant(text: str) -> tuple[str, object]:
    """`NAME=3`, `NAME=True`, `NAME=words`."""
    name, value = text.split("=")
    known = {"True": True, "False": False, "None": None}
    return name, known[value] if value in known else int(value) if value.lstrip("-").isdigit() else value


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, default=90, help="default 90; others have no timing")
    parser.add_argument("--kernel", help="of kernels/attn/triton.py, or with --cuda of csrc/attn")
    parser.add_argument("--cuda", action="store_true", help="what nvcc makes of csrc/attn")
    parser.add_argument("--tiles", nargs="+", type=tiles, help="queries,keys,warps,stages; default: as they ship")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--dense", action="store_true", help="dense spatial keys and a mask")
    parser.add_argument("--width", type=int, default=32, choices=(32, 64, 128), help="of heads")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="fp32: with TF32")
    parser.add_argument("--set", nargs="+", type=constant, default=[], help="NAME=value: compile-time arguments")
    parser.add_argument("--listing", action="store_true", help="print the instructions of the main loop's trip")
    return parser


def main() -> int:
    """Compile, predict, print."""
    options = arguments().parse_args()
    show(of_cuda(options) if options.cuda else explore(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
