"""The command line of `benchmarks/run.py NAME`."""

import argparse


def command(name: str, documentation: str) -> argparse.ArgumentParser:
    """A parser without flags.

    Args:
        name: after `run.py`.
        documentation: the module's docstring; its first line is the description.
    """
    return argparse.ArgumentParser(prog=f"run.py {name}", description=documentation.splitlines()[0])
