"""Why a query is dropped: the reasons that are counted, and the rules of `queries.rules`.

A rule looks at one query alone. A query that breaks several is counted under the first, in the order
of REASONS.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vpo_ray.keywords import KeywordFileError, KeywordList
from vpo_ray.prompts.words import WORD
from vpo_ray.recipe import Rules

REASONS = (
    "",
    # a row that is no text
    "null", "no such column", "not JSON", "not CSV", "not text", "invalid UTF-8", "binary",
    # of any use
    "empty", "too long", "too short", "bad unsafe label", "only flags",
    # an image
    "no path of an image", "no such image", "image too large", "broken image",
    # rules
    "too few words", "too many words", "special characters", "too many digits", "URL", "keyword", "language",
    # of all queries together
    "duplicate", "near duplicate", "over the limit", "not in the subset",
)  # fmt: skip
KEPT = 0
_CODES = {reason: number for number, reason in enumerate(REASONS)}

_SPECIAL = r"[^\p{L}\p{M}\p{N}\s\p{Z}]"
_URL = (
    r"(?i)\b(?:[a-z][a-z0-9+.-]*://|www\.)[^\s]|"
    r"\b[a-z0-9-]+\.(?:com|org|net|io|tv|gg|ru|de|fr|uk|cn|jp|me|ly|co)(?:/|\b)"
)


class RulesError(ValueError):
    """A rule that cannot be applied as the recipe has it; the message says why."""


def reason_code(reason: str) -> int:
    """The number that stands for a reason in a column."""
    return _CODES[reason]


def visible(text: str) -> bool:
    """Whether a text shows anything at all: not white space and zero-width characters only."""
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def apply(texts: pa.Array, rules: Rules) -> np.ndarray:
    """The reason of every text, KEPT where it breaks no rule: int8, shape (n,).

    Raises:
        RulesError: the keyword file cannot be read, or a language is not known.
    """
    broken: list[tuple[str, Any]] = []
    if rules.min_words is not None or rules.max_words is not None:
        words = pc.count_substring_regex(texts, pattern=WORD).to_numpy(zero_copy_only=False)
        broken += [("too few words", words < (rules.min_words or 0))]
        broken += [("too many words", words > (rules.max_words or np.inf))]
    if rules.max_special_share is not None:
        special = pc.count_substring_regex(texts, pattern=_SPECIAL).to_numpy(zero_copy_only=False)
        lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
        broken += [("special characters", special > rules.max_special_share * lengths)]
    if rules.max_digits is not None:
        digits = pc.count_substring_regex(texts, pattern=r"\p{Nd}").to_numpy(zero_copy_only=False)
        broken += [("too many digits", digits > rules.max_digits)]
    if rules.urls:
        found = pc.match_substring_regex(texts, pattern=_URL)
        broken += [("URL", found.to_numpy(zero_copy_only=False))]
    reasons = np.zeros(len(texts), np.int8)
    for reason, where in broken:
        reasons[(reasons == KEPT) & where] = reason_code(reason)
    if rules.keywords is not None or rules.languages is not None:
        # Row by row, so only those that are left.
        for row in np.flatnonzero(reasons == KEPT).tolist():
            reasons[row] = _slow(texts[row].as_py(), rules)
    return reasons


def _slow(text: str, rules: Rules) -> int:
    if rules.keywords is not None and _keywords(rules.keywords).find(text) is not None:
        return reason_code("keyword")
    if rules.languages is not None:
        language, confidence = _identifier(tuple(rules.languages)).classify(text)
        if language not in rules.languages and confidence >= rules.language_confidence:
            return reason_code("language")
    return KEPT


def check_rules(rules: Rules) -> None:
    """Raises RulesError when the keyword file cannot be read or a language is not known."""
    if rules.keywords is not None:
        _keywords(rules.keywords)
    if rules.languages is not None:
        _identifier(tuple(rules.languages))


def language_of(text: str) -> str | None:
    """The code of a text's language; None where the text is too short to tell."""
    language, confidence = _identifier(()).classify(text)
    return str(language) if confidence >= Rules().language_confidence else None


def comparable(text: str) -> str:
    """A text for comparison: compatible forms and cases as one, only words, one space between them."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()))


@functools.lru_cache(maxsize=4)
def _keywords(path: str) -> KeywordList:
    try:
        return KeywordList.read(path)
    except KeywordFileError as error:
        raise RulesError(f"queries.rules.keywords: {error}") from error


@functools.lru_cache(maxsize=4)
def _identifier(languages: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = sorted(set(languages) - set(identifier.labels))
    if unknown:
        raise RulesError(
            f"queries.rules.languages: {', '.join(unknown)} not known; "
            f"known are {', '.join(identifier.labels)}"
        )
    return identifier
