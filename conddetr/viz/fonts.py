"""Letters for names in any script: matplotlib's own font has Latin, Greek, Cyrillic and Arabic ones, and no others."""

import logging
import unicodedata
from collections.abc import Sequence, Set

from matplotlib import rcParams
from matplotlib.font_manager import FontProperties, fontManager, get_font, weight_dict

log = logging.getLogger(__name__)

NO_LETTERS = ("lastresort", "adobeblank")
"""Fonts that hold every character and draw none of them, by the beginning of their names."""
MISSING = "?"
"""Is drawn for a character that no font has."""

_family_of: dict[str, str] = {}
"""Family that draws each character beyond ASCII, of all that were looked for; empty: none does."""


def lettering(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts as they can be drawn, and the font families to draw them in.

    Installed fonts are searched only for what the default font does not have. Where none has a character, it is drawn
    as `MISSING`, and a warning says so, once in a process.

    Args:
        texts: names and captions. What has no shape, such as a tab, is left out; line breaks stay.

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


def _is_letter(character: str) -> bool:
    """Whether a font has to be asked for it: it is not of ASCII, and no control character or half of a pair."""
    return not character.isascii() and unicodedata.category(character) not in ("Cc", "Cs")


def _drawable(text: str) -> str:
    # Marks change a letter that is absent too.
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
    """Fill `_family_of` for these letters, from few families: the default, those in use, then all that are there."""
    in_use = dict.fromkeys(family for family in _family_of.values() if family)
    left = set(letters)
    for family in (*default, *in_use):
        found = _having(FontProperties(family=[family]), left)
        _family_of.update(dict.fromkeys(found, family))
        left -= found
    if left:
        having = {family: _having(face, left) for family, face in _faces().items()}
        while left and any(having.values()):
            # The first of those that have most of the letters.
            best = max(having, key=lambda family: len(having[family]))
            _family_of.update(dict.fromkeys(having[best], best))
            left -= having[best]
            having = {family: found & left for family, found in having.items()}
    _family_of.update(dict.fromkeys(left, ""))


def _faces() -> dict[str, FontProperties]:
    """The upright face of usual weight, or what is next to it, of every installed family.

    Usual weights come first, and those without serifs among them, as the default font is.
    """
    ranked = []
    for entry in fontManager.ttflist:
        if not entry.name.lower().replace(" ", "").lstrip(".").startswith(NO_LETTERS):
            distance = abs(weight_dict.get(entry.weight, entry.weight) - weight_dict["normal"])
            ranked.append((entry.style != "normal", distance, "sans" not in entry.name.lower(), entry.name, entry))
    faces: dict[str, FontProperties] = {}
    for *_, name, entry in sorted(ranked, key=lambda item: item[:-1]):
        # Asked for by its own weight: matplotlib warns where it finds another one.
        face = FontProperties(family=[name], style=entry.style, weight=entry.weight, stretch=entry.stretch)
        faces.setdefault(name, face)
    return faces


def _having(face: FontProperties, letters: Set[str]) -> set[str]:
    """Which of the letters a face has."""
    if not letters:
        return set()
    try:
        font = get_font(fontManager.findfont(face))
    # A file that was removed since matplotlib listed it, or that FreeType cannot read.
    except (OSError, RuntimeError):
        return set()
    return {letter for letter in letters if font.get_char_index(ord(letter))}


def _report(texts: Sequence[str], unknown: Set[str]) -> None:
    """Warn of the first letter without a font, unless one was before."""
    absent = {letter for letter in unknown if not _family_of[letter]}
    earlier = any(not family for letter, family in _family_of.items() if letter not in absent)
    if absent and not earlier:
        text = next(text for text in texts if absent & set(text))
        letter = next(letter for letter in text if letter in absent)
        log.warning(
            "No installed font has all letters of %r (first: %r, U+%04X): such are drawn as %s. Install a font of that "
            "script, for instance one of Noto Sans.",
            text,
            letter,
            ord(letter),
            MISSING,
        )
