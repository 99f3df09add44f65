"""Marks in the pictures and videos that commands draw, by which later commands recognise them."""

import hashlib
import json
import os
import struct
from pathlib import Path

from PIL import Image

_BOX = b"free"
"""Type of the part of an MP4 file that holds the marks; players skip it."""
_LONGEST = 1 << 12
"""Maximum bytes of such a part."""


def marks(command: str, source: str | Path | None = None) -> dict[str, str]:
    """The command's name and, as a hash, the image or the video that was drawn; without a source, the name alone."""
    software = {"Software": f"conddetr {command}"}
    if source is None:
        return software
    name = os.fsencode(source.resolve() if isinstance(source, Path) else source)
    return {**software, "Source": hashlib.blake2b(name, digest_size=16).hexdigest()}


def has_marks(path: Path, expected: dict[str, str]) -> bool:
    """Whether a file is a PNG or an MP4 with these marks. A file that cannot be read has none."""
    if path.suffix.lower() == ".png":
        texts = _png_texts(path)
    elif path.suffix.lower() == ".mp4":
        texts = _mp4_texts(path)
    else:
        return False
    return all(texts.get(key) == text for key, text in expected.items())


def mark_mp4(path: Path, texts: dict[str, str]) -> None:
    """Append marks to an MP4 file."""
    content = json.dumps(texts).encode()
    with open(path, "ab") as file:
        file.write(struct.pack(">I4s", 8 + len(content), _BOX) + content)


def _png_texts(path: Path) -> dict[str, str]:
    try:
        with Image.open(path) as picture:
            return {str(key): value for key, value in picture.info.items() if isinstance(value, str)}
    # The file is no picture, or larger than Pillow's limit.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return {}


def _mp4_texts(path: Path) -> dict[str, str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _LONGEST))
            end = file.read()
        texts = json.loads(end[end.rfind(_BOX) + len(_BOX) :])
    # The file cannot be read, or another program wrote it: its end is not UTF-8 or not JSON.
    except (OSError, ValueError):
        return {}
    return texts if isinstance(texts, dict) else {}
