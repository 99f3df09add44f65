"""Writes `tutorial.ipynb` from `tutorial.md`: the same text, and a cell for each block of Python or of commands."""

from pathlib import Path

import jupytext

DOCS = Path(__file__).parent
HEADER = """---
jupyter:
  kernelspec: {name: python3, display_name: Python 3, language: python}
---
"""
"""Says that a cell is Python unless it begins with `%%sh`."""


def main() -> None:
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    notebook = jupytext.reads(HEADER + page, "md")
    for number, cell in enumerate(notebook.cells):
        # By default ids are random, and every run would change the file.
        cell.id = f"cell-{number}"
    jupytext.write(notebook, DOCS / "tutorial.ipynb", fmt="ipynb")


if __name__ == "__main__":
    main()
