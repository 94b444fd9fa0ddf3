"""Search a text for words and phrases of a list: for the safety gate and for curation.

A file has a word or phrase per line; `#` at the start of a line, or after white space, starts a comment. Text
and list are compared as a reader sees them: in any case, in any form of the characters (full width,
ligatures, circled), with or without marks on letters, and without invisible characters (soft hyphens,
zero-width and bidirectional characters, variation selectors, tags).

Only whole words match ("ass" is not in "class"), except in scripts written without spaces. The words of a
phrase may be separated by any white space or punctuation. A term with symbols ("c++", "f*ck", an emoji) must
match exactly.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vpo_ray.files.text_files import TextFileError, read_lines


class KeywordFileError(ValueError):
    """A list of words that cannot be used; the message says why."""


class _Lazy(dict[int, str]):
    """A table for `str.translate` that is filled on demand."""

    def __init__(self, of: Callable[[str], str]) -> None:
        self.of = of

    def __missing__(self, code: int) -> str:
        found = self[code] = self.of(chr(code))
        return found


class KeywordList:
    """Terms to search for.

    Args:
        terms: words and phrases; those of only white space and punctuation are ignored.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        self.size = 0
        self._plain: dict[str, Any] = {}
        self._symbolic: dict[str, Any] = {}
        for term in terms:
            folded = fold(term)
            words, shown = _spaced(folded.translate(_WORDS)), _spaced(folded.translate(_SYMBOLS))
            if not shown:
                continue
            self.size += 1
            for form in (shown, _DENSE_GAP.sub("", shown)):
                _insert(self._plain if words == shown else self._symbolic, form)

    @classmethod
    def read(cls, path: str | Path) -> KeywordList:
        """The terms of a file. Raises KeywordFileError if it cannot be read or has none."""
        try:
            lines = read_lines(path)
        except TextFileError as error:
            raise KeywordFileError(str(error)) from error
        found = cls(_COMMENT.split(line, maxsplit=1)[0] for line in lines)
        if not found.size:
            raise KeywordFileError(f"{path} holds no word; write one per line")
        return found

    def find(self, text: str) -> str | None:
        """The first term in the text, in folded form, or None."""
        return next(self._found(text), None)

    def find_all(self, text: str) -> set[str]:
        """Every term in the text, in folded form; of those that begin at one place, the longest."""
        return set(self._found(text))

    def _found(self, text: str) -> Iterator[str]:
        folded = fold(text)
        yield from _search(self._plain, _spaced(folded.translate(_WORDS)))
        if self._symbolic:
            yield from _search(self._symbolic, _spaced(folded.translate(_SYMBOLS)))


def fold(text: str) -> str:
    """A text for comparison: without differences of form, case and marks, or invisible characters.

    Vowel signs of Indic scripts, tone marks of Thai and voicing marks of kana are letters, not marks.
    """
    # Marks are removed first: normalising a long run of them takes quadratic time.
    text = unicodedata.normalize("NFKD", text.translate(_LETTERS)).casefold()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", text).translate(_LETTERS))


# Invisible characters of Unicode's Default_Ignorable_Code_Point; so is all of category Cf.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Canonical combining classes of marks that do not change a word: overlays, Hebrew points, Arabic and Syriac
# vowel marks, and marks around a letter (such as U+0300).
_MARKS = {1, *range(10, 37), 202, *range(214, 241)}
_ASIDE = re.compile(r"(?:LATIN|GREEK|CYRILLIC) SMALL LETTER .+?(?= WITH )")
_DRAWN = re.compile(
    r"(?:LATIN LETTER SMALL CAPITAL|NEGATIVE (?:CIRCLED|SQUARED) LATIN CAPITAL LETTER) ([A-Z])"
)
_COMMENT = re.compile(r"(?:^|(?<=\s))#")
# Scripts that are written without spaces between words: Thai, Lao, Myanmar, Khmer, Tai, Javanese,
# Balinese, Yi, kana, Bopomofo, Han.
_DENSE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007"
    "\u3021-\u3029\u3031-\u303b\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf\ua980-\ua9ff"
    "\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_IS_DENSE = re.compile(f"[{_DENSE}]")
_DENSE_GAP = re.compile(f"(?<=[{_DENSE}]) (?=[{_DENSE}])")
# A space between the two kinds of scripts is only typography.
_MIXED_GAP = re.compile(f"(?<=[{_DENSE}]) (?=[^ {_DENSE}])|(?<=[^ {_DENSE}]) (?=[{_DENSE}])")
_TERM = ""


def _letter(character: str) -> str:
    """The folded form of a decomposed character."""
    category = unicodedata.category(character)
    if category == "Cf" or _IGNORABLE.match(character) or character == "\u0640":  # the Arabic tatweel
        return ""
    if category == "Cc":
        return " " if character.isspace() else ""
    if category == "Me" or (category == "Mn" and unicodedata.combining(character) in _MARKS):
        return ""
    name = unicodedata.name(character, "")
    if found := _ASIDE.match(name):
        return unicodedata.lookup(found[0])
    if found := _DRAWN.fullmatch(name):
        return found[1].lower()
    return "i" if character == "\u0131" else character


def _word(character: str) -> str:
    return character if unicodedata.category(character)[0] in "LMN" else " "


def _symbol(character: str) -> str:
    kept = unicodedata.category(character)[0] in "LMNS" or character in "*#@&%"
    return character if kept else " "


def _side(character: str) -> str:
    """`w` for a character of a word in a script written with spaces, else `-`."""
    return "w" if _word(character) != " " and not _IS_DENSE.match(character) else "-"


_LETTERS, _WORDS, _SYMBOLS, _SIDES = map(_Lazy, (_letter, _word, _symbol, _side))
_START = re.compile("(?<!w)w|-")


def _spaced(text: str) -> str:
    return _MIXED_GAP.sub("", " ".join(text.split()))


def _insert(trie: dict[str, Any], term: str) -> None:
    for character in term:
        trie = trie.setdefault(character, {})
    trie[_TERM] = term


def _search(trie: dict[str, Any], text: str) -> Iterator[str]:
    """The matches in a text of a trie's terms, the longest at each start; none starts or ends in a word."""
    sides = text.translate(_SIDES)
    for match in _START.finditer(sides):
        node, end, found = trie, match.start(), None
        while end < len(text) and (node := node.get(text[end])) is not None:  # type: ignore[assignment]
            end += 1
            if _TERM in node and sides[end - 1 : end + 1] != "ww":
                found = node[_TERM]
        if found is not None:
            yield str(found)
