"""Whether a text is written in the script of a language.

A script tells what a text is not in. It does not tell languages of one script apart: German passes for
English, Ukrainian for Russian. Chinese and Japanese are told apart by kana, which short Japanese may lack.
"""

from __future__ import annotations

from unicodedata import normalize

import pyarrow as pa
import pyarrow.compute as pc

# Scripts by Unicode's names, and ISO 639-1 codes of the languages that are written in them.
_LANGUAGES = {
    "Latin": "cs da de en es fi fr hr hu id it ms nl no pl pt ro sk sr sv sw tl tr vi",
    "Cyrillic": "bg kk mk ru sr uk",
    "Arabic": "ar fa ur",
    "Devanagari": "hi mr ne",
    "Bengali": "bn",
    "Tamil": "ta",
    "Telugu": "te",
    "Thai": "th",
    "Greek": "el",
    "Hebrew": "he",
    "Georgian": "ka",
    "Armenian": "hy",
    "Hangul": "ko",
    "Han": "ja zh",
    "Hiragana": "ja",
    "Katakana": "ja",
}
# Written without spaces, so that each character counts as a word.
_DENSE = {"Thai", "Han", "Hiragana", "Katakana"}
_UNITS = {
    script: rf"\p{{{script}}}" if script in _DENSE else rf"\p{{{script}}}[\p{{{script}}}\p{{M}}'’-]*"
    for script in _LANGUAGES
}
_OTHER = r"[^\P{L}\p{Lm}" + "".join(rf"\p{{{script}}}" for script in _LANGUAGES) + "]+"
# Of Han characters and kana, the share of kana above which a text is Japanese; running text has about half.
_KANA = 0.1

LANGUAGES = frozenset(code for codes in _LANGUAGES.values() for code in codes.split())


def in_script_of(language: str, text: str) -> bool:
    """Whether at least half of a text's words are in the script of a language, one of `LANGUAGES`; true of a
    text without letters."""
    words = pa.array([normalize("NFKC", text)], pa.string())
    counts = {script: _count(words, unit) for script, unit in _UNITS.items()}
    kana = counts["Hiragana"] + counts["Katakana"]
    if language in ("ja", "zh") and kana + counts["Han"]:
        japanese = kana > _KANA * (kana + counts["Han"])
        if japanese != (language == "ja"):
            return False
    mine = sum(counts[script] for script, codes in _LANGUAGES.items() if language in codes.split())
    return 2 * mine >= sum(counts.values()) + _count(words, _OTHER)


def _count(words: pa.Array, pattern: str) -> int:
    return int(pc.count_substring_regex(words, pattern=pattern)[0].as_py())
