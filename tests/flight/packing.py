"""What comes back from a flight: a few flat files that are small enough to be carried."""

import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

LARGEST = 16 << 20
"""Bytes; every file is smaller."""


def cap(path: Path, most: int) -> int:
    """Shorten a file to about `most` bytes, its head and its tail; returns how many bytes were left out."""
    size = path.stat().st_size
    if size <= most:
        return 0
    with path.open("rb") as file:
        head = file.read(most // 2)
        file.seek(size - most // 2)
        tail = file.read()
    left_out = size - len(head) - len(tail)
    path.write_bytes(head + f"\n[… {left_out:,} bytes left out …]\n".encode() + tail)
    return left_out


def pack(files: Iterable[Path], root: Path, target: Path) -> None:
    """An archive of files, named as they are below `root`."""
    # Packed after every step, on time that costs: fast, not small.
    with tarfile.open(target, "w:gz", compresslevel=1) as archive:
        for path in sorted(files):
            archive.add(path, path.relative_to(root))


def fits(path: Path) -> str | None:
    """None, or why a file cannot come back."""
    size = path.stat().st_size
    if size < LARGEST:
        return None
    return f"{size / 2**20:.1f} MiB, files of {LARGEST >> 20} MiB or more do not come back"


def launchable(cache: Path) -> list[Path]:
    """Of Triton's cache what launching needs: machine code and its description, not the stages of compilation."""
    return [path for path in cache.glob("*/*") if path.suffix in (".cubin", ".json", ".so")]


def unpack_cache(archive: Path, cache: Path) -> int:
    """Put a packed Triton cache in place; returns the number of kernels.

    Triton notes in `__grp__….json` the full path of each file that belongs to a kernel, and takes none of them if one
    is missing: they are written anew, with what is there.
    """
    shutil.unpack_archive(archive, cache, "gztar", filter="data")
    groups = list(cache.glob("*/__grp__*.json"))
    for group in groups:
        names = json.loads(group.read_text())["child_paths"]
        there = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": there}))
    return len(groups)
