"""How many words a text has, as rules, measures and rewards count them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = rf"[{_NO_SPACES}]|[^\s\p{{Z}}{_NO_SPACES}]+"


def word_count(text: str) -> int:
    """Words, of which each character is one in scripts that are written without spaces."""
    return int(pc.count_substring_regex(pa.array([text], pa.string()), pattern=WORD)[0].as_py())
