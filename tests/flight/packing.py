"""Packs a flight's results into a few files that are small enough to be copied."""

import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

LARGEST = 16 << 20
"""Limit in bytes; every file is smaller."""


def cap(path: Path, most: int) -> int:
    """Cut a file to its head and tail, about `most` bytes together; returns the number of bytes left out."""
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
    """Write an archive of files, named by their paths below `root`."""
    # Packing is part of the flight's time limit: speed matters more than size.
    with tarfile.open(target, "w:gz", compresslevel=1) as archive:
        for path in sorted(files):
            archive.add(path, path.relative_to(root))


def fits(path: Path) -> str | None:
    """None, or the reason why a file cannot come back."""
    size = path.stat().st_size
    if size < LARGEST:
        return None
    return f"{size / 2**20:.1f} MiB, files of {LARGEST >> 20} MiB or more do not come back"


def launchable(cache: Path) -> list[Path]:
    """The files of Triton's cache that a launch needs: machine code and its description, not compilation stages."""
    return [path for path in cache.glob("*/*") if path.suffix in (".cubin", ".json", ".so")]


def unpack_cache(archive: Path, cache: Path) -> int:
    """Unpack a Triton cache; returns the number of kernels.

    Triton stores the full path of each file of a kernel in `__grp__….json`, and uses none of them if one is missing.
    These paths are rewritten for the files that exist.
    """
    shutil.unpack_archive(archive, cache, "gztar", filter="data")
    groups = list(cache.glob("*/__grp__*.json"))
    for group in groups:
        names = json.loads(group.read_text())["child_paths"]
        paths = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": paths}))
    return len(groups)
