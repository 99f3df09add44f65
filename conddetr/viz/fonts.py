"""Fonts for names in any script: matplotlib's default font has Latin, Greek, Cyrillic and Arabic letters only."""

import logging
import unicodedata
from collections.abc import Sequence, Set

from matplotlib import rcParams
from matplotlib.font_manager import FontProperties, fontManager, get_font, weight_dict

log = logging.getLogger(__name__)

NO_LETTERS = ("lastresort", "adobeblank")
"""Prefixes of the names of fonts that map every character but draw no real letters."""
MISSING = "?"
"""Replacement for a character that no font has."""

_family_of: dict[str, str] = {}
"""Non-ASCII character, of those searched so far → family of the font that draws it; empty: no font does."""


def lettering(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Drawable texts, and the font families to draw them in.

    Installed fonts are searched only for characters that the default font lacks. A character that no font has is drawn
    as `MISSING`, and a warning reports it once per process.

    Args:
        texts: names and captions. Characters without a shape, such as tabs, are removed; line breaks stay.

    Returns:
        The texts, and families for matplotlib's `family`, the default first.
    """
    default = list(rcParams["font.family"])
    letters = {letter for text in texts for letter in text if _is_letter(letter)}
    if unknown := letters - _family_of.keys():
        _look_for(unknown, default)
        _report(texts, unknown)
    families = dict.fromkeys([*default, *(_family_of[letter] for letter in sorted(letters) if _family_of[letter])])
    return [_drawable(text) for text in texts], list(families)


def family_of(character: str) -> str:
    """The font family that draws a character of a text that `lettering` returned."""
    return _family_of.get(character) or str(rcParams["font.family"][0])


def _is_letter(character: str) -> bool:
    """Whether a character needs a font lookup: it is not ASCII, no control character and no surrogate."""
    return not character.isascii() and unicodedata.category(character) not in ("Cc", "Cs")


def _drawable(text: str) -> str:
    # A combining mark is removed, because the letter that it changes is missing too.
    absent = {
        letter: "" if unicodedata.category(letter)[0] in "CM" else MISSING
        for letter in set(text)
        if _is_letter(letter) and not _family_of[letter]
    }
    return "".join(
        absent.get(character, character)
        for character in text
        if character == "\n" or _is_letter(character) or (character.isascii() and character.isprintable())
    )


def _look_for(letters: Set[str], default: Sequence[str]) -> None:
    """Fill `_family_of` for these letters from few families: the default, those in use, then all installed ones."""
    in_use = dict.fromkeys(family for family in _family_of.values() if family)
    missing = set(letters)
    for family in (*default, *in_use):
        covered = _having(FontProperties(family=[family]), missing)
        _family_of.update(dict.fromkeys(covered, family))
        missing -= covered
    if missing:
        coverage = {family: _having(face, missing) for family, face in _faces().items()}
        while missing and any(coverage.values()):
            # The first family among those with most of the letters.
            best = max(coverage, key=lambda family: len(coverage[family]))
            _family_of.update(dict.fromkeys(coverage[best], best))
            missing -= coverage[best]
            coverage = {family: covered & missing for family, covered in coverage.items()}
    _family_of.update(dict.fromkeys(missing, ""))


def _faces() -> dict[str, FontProperties]:
    """Every installed family → its upright face of normal weight, or the closest face.

    Families with such a face come first, and sans-serif ones among them, because the default font is sans-serif.
    """
    ranked = []
    for entry in fontManager.ttflist:
        if not entry.name.lower().replace(" ", "").lstrip(".").startswith(NO_LETTERS):
            distance = abs(weight_dict.get(entry.weight, entry.weight) - weight_dict["normal"])
            ranked.append((entry.style != "normal", distance, "sans" not in entry.name.lower(), entry.name, entry))
    faces: dict[str, FontProperties] = {}
    for *_, name, entry in sorted(ranked, key=lambda item: item[:-1]):
        # Requested with the face's own weight: matplotlib warns if it returns another one.
        face = FontProperties(family=[name], style=entry.style, weight=entry.weight, stretch=entry.stretch)
        faces.setdefault(name, face)
    return faces


def _having(face: FontProperties, letters: Set[str]) -> set[str]:
    """The letters that a face has, among the given ones."""
    if not letters:
        return set()
    try:
        font = get_font(fontManager.findfont(face))
    # The file was removed after matplotlib had listed it, or FreeType cannot read it.
    except (OSError, RuntimeError):
        return set()
    return {letter for letter in letters if font.get_char_index(ord(letter))}


def _report(texts: Sequence[str], unknown: Set[str]) -> None:
    """Warn about the first letter without a font, unless an earlier call did."""
    absent = {letter for letter in unknown if not _family_of[letter]}
    earlier = any(not family for letter, family in _family_of.items() if letter not in absent)
    if absent and not earlier:
        text = next(text for text in texts if absent & set(text))
        letter = next(letter for letter in text if letter in absent)
        log.warning(
            "No installed font has all letters of %r (first missing: %r, U+%04X): missing letters are drawn as %s. "
            "Install a font of that script, for instance one of Noto Sans.",
            text,
            letter,
            ord(letter),
            MISSING,
        )
