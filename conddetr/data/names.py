"""Image files by their names in annotation files."""

import unicodedata
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote


def find_image(folder: str | Path, name: str) -> Path:
    """The file of an image.

    An existing name is used as it is. Otherwise spellings of other systems and tools are tried: with backslashes
    between folders, with percent-encoding, in another case, with accents composed differently.

    Args:
        folder: the folder of the images.
        name: as in the annotation file, relative to the folder.

    Raises:
        FileNotFoundError: there is no such file; names the spellings that were tried.
        ValueError: several files differ from the name only in case.
    """
    exact = Path(folder) / name
    if exact.is_file():
        return exact
    spellings = list(dict.fromkeys((name, name.replace("\\", "/"), unquote(name), unquote(name).replace("\\", "/"))))
    for spelling in spellings[1:]:
        if "\0" not in spelling and (Path(folder) / spelling).is_file():
            return Path(folder) / spelling
    matches = list(dict.fromkeys(path for spelling in spellings for path in _in_any_case(Path(folder), spelling)))
    if len(matches) > 1:
        listed = ", ".join(str(path) for path in matches[:3])
        raise ValueError(f"Image file {exact} does not exist, and several files differ from it only in case: {listed}.")
    if matches:
        return matches[0]
    if exact.is_dir():
        raise FileNotFoundError(f"Image file {exact} is a folder.")
    tried = f" Nor does {', '.join(spellings[1:])}." if spellings[1:] else ""
    backslashes = " Its name has backslashes, which separate folders only on Windows." if "\\" in name else ""
    raise FileNotFoundError(f"Image file {exact} does not exist.{backslashes}{tried}{_elsewhere(Path(folder), name)}")


def _elsewhere(folder: Path, name: str) -> str:
    """A hint if the file exists without the leading folders of its name, or beside the folder; else empty."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    for path in (folder.joinpath(*parts[-1:]), folder.parent / name):
        if len(parts) > 1 and path.is_file():
            return f" {path} exists: names must be relative to the folder of the images."
    return ""


def _in_any_case(folder: Path, name: str) -> list[Path]:
    """All files whose names differ only in case or in the composition of accents."""
    paths = [folder]
    for part in Path(name).parts:
        paths = [path / entry for path in paths for entry in ([part] if part == ".." else _named(path, part))]
    return [path for path in paths if path.is_file()]


def _named(folder: Path, name: str) -> list[str]:
    try:
        return _listed(folder, folder.stat().st_mtime_ns).get(_key(name), [])
    # Not a folder, or not readable.
    except OSError:
        return []


@lru_cache(maxsize=16)
def _listed(folder: Path, changed: int) -> dict[str, list[str]]:
    """Names by their key without case and composition; `changed` is the folder's time stamp, which renews the cache."""
    names: dict[str, list[str]] = {}
    for entry in folder.iterdir():
        names.setdefault(_key(entry.name), []).append(entry.name)
    return names


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
