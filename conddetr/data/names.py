"""Image files by the names that annotation files give them."""

import unicodedata
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote


def find_image(folder: str | Path, name: str) -> Path:
    """The file of an image.

    A name that is there is taken as it is. Else, names from other systems and tools are tried: with backslashes
    between folders, with percent-encoding, in other case, with accents composed otherwise.

    Args:
        folder: of the images.
        name: as in the annotation file, relative to the folder.

    Raises:
        FileNotFoundError: there is none; says how the name was read.
        ValueError: several files differ from it in case alone.
    """
    exact = Path(folder) / name
    if exact.is_file():
        return exact
    spellings = list(dict.fromkeys((name, name.replace("\\", "/"), unquote(name), unquote(name).replace("\\", "/"))))
    for spelling in spellings[1:]:
        if "\0" not in spelling and (Path(folder) / spelling).is_file():
            return Path(folder) / spelling
    found = list(dict.fromkeys(path for spelling in spellings for path in _in_any_case(Path(folder), spelling)))
    if len(found) > 1:
        listed = ", ".join(str(path) for path in found[:3])
        raise ValueError(f"Image file {exact} does not exist, and more than one differs in case alone: {listed}.")
    if found:
        return found[0]
    if exact.is_dir():
        raise FileNotFoundError(f"Image file {exact} is a folder.")
    others = f" Nor does it as {', '.join(spellings[1:])}." if spellings[1:] else ""
    backslashes = " Its name has backslashes, which separate folders on Windows alone." if "\\" in name else ""
    raise FileNotFoundError(f"Image file {exact} does not exist.{backslashes}{others}{_elsewhere(Path(folder), name)}")


def _elsewhere(folder: Path, name: str) -> str:
    """Where the file would be if its name began with other folders; empty: not there either."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    for place in (folder.joinpath(*parts[-1:]), folder.parent / name):
        if len(parts) > 1 and place.is_file():
            return f" {place} is there: names must be relative to the folder of the images."
    return ""


def _in_any_case(folder: Path, name: str) -> list[Path]:
    """All files whose name differs in case or in the composition of accents alone."""
    found = [folder]
    for part in Path(name).parts:
        found = [path / entry for path in found for entry in ([part] if part == ".." else _named(path, part))]
    return [path for path in found if path.is_file()]


def _named(folder: Path, name: str) -> list[str]:
    try:
        return _listed(folder, folder.stat().st_mtime_ns).get(_key(name), [])
    # No folder, or none that may be read.
    except OSError:
        return []


@lru_cache(maxsize=16)
def _listed(folder: Path, changed: int) -> dict[str, list[str]]:
    """Names by what case and composition do not change; `changed` makes the answer that of the folder as it is."""
    names: dict[str, list[str]] = {}
    for entry in folder.iterdir():
        names.setdefault(_key(entry.name), []).append(entry.name)
    return names


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
