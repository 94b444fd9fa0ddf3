"""Ids and seeds are functions of content alone, and a table takes only what its schema says."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.records import (
    FEEDBACK,
    PAIR,
    QUERY,
    candidate_id,
    content_id,
    failed,
    normalise,
    pair_id,
    query_id,
    seed_of,
    share_of,
    table,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
JSON = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(TEXT, SCALAR, max_size=3)

quick = settings(deadline=None, max_examples=50)
CANDIDATE = {"candidate_id": "c", "query_id": "q", "query": "a cat", "k": 0, "seed": 1}


def test_ids_never_change() -> None:
    """Stored runs are resumed by these ids and rendered videos found by these seeds: a change here
    makes every finished run start again."""
    key = query_id("A cat\non a roof")
    assert key == "95da4b677f56a1c2eca1ad82ca8344de"
    assert candidate_id(key, 1, "pol", {"temperature": 0.9, "seed": 7}) == "61dddb9819c0888d3ba8e4b3eb2659fe"
    assert pair_id("video", "a", "b", "x", "y") == "7891ed7f8c97b9cdbf2c29b0c194e05d"
    assert seed_of("video", 7, key) == 821944685
    assert share_of("split", key) == 0.7698573550796497
    assert content_id("é", 1, None, True, 1.5, [{"b": 1, "a": 2}], digits=16) == "5ac57a8ca06c7aa8"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a cat", "  a cat\n"),
        ("a\nb", "a\r\nb"),
        ("a\nb", "a\rb"),
        ("caf\u00e9", "cafe\u0301"),
        ("\uac00", "\u1100\u1161"),
        ("\u212b", "\u00c5"),
    ],
)
def test_one_query_written_in_two_ways_has_one_id(one: str, other: str) -> None:
    assert query_id(one) == query_id(other)


@pytest.mark.parametrize(
    ("one", "other"), [("a cat", "A cat"), ("a cat", "a  cat"), ("ﬁ", "fi"), ("ab", "a\nb"), ("", "0")]
)
def test_other_queries_have_other_ids(one: str, other: str) -> None:
    assert query_id(one) != query_id(other)


@quick
@given(TEXT)
def test_normalise_is_settled_after_once(text: str) -> None:
    done = normalise(text)
    assert normalise(done) == done
    assert unicodedata.is_normalized("NFC", done)
    assert "\r" not in done
    assert done == done.strip()


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_character_is_no_text(text: str) -> None:
    with pytest.raises(UnicodeEncodeError):
        normalise(text)


@quick
@given(st.dictionaries(TEXT, JSON, max_size=5), st.randoms())
def test_the_order_of_keys_does_not_count(sampling: dict[str, Any], random: Any) -> None:
    keys = list(sampling)
    random.shuffle(keys)
    shuffled = {key: sampling[key] for key in keys}
    assert candidate_id("q", 0, "p", sampling) == candidate_id("q", 0, "p", shuffled)


@quick
@given(st.lists(TEXT, min_size=1), st.data())
def test_parts_are_not_just_joined(parts: list[str], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(parts[0])))
    if parts[0][:cut] and parts[0][cut:]:
        assert content_id(*parts) != content_id(parts[0][:cut], parts[0][cut:], *parts[1:])
    assert content_id(*parts) != content_id(*parts, "")


@quick
@given(st.lists(JSON, max_size=4))
def test_seeds_and_shares_stay_in_range(parts: list[Any]) -> None:
    assert 0 <= seed_of(*parts) < 2**31
    assert 0.0 <= share_of(*parts) < 1.0
    assert seed_of(*parts) == seed_of(*parts)


def test_shares_and_seeds_are_spread() -> None:
    shares = sorted(share_of("x", i) for i in range(2000))
    assert max(abs(share - i / 2000) for i, share in enumerate(shares)) < 0.04
    assert len({seed_of("x", i) for i in range(2000)}) == 2000


def test_absent_columns_are_null() -> None:
    stored = table([CANDIDATE], FEEDBACK)
    assert stored.schema == FEEDBACK
    row = stored.to_pylist()[0]
    assert row["score"] is None
    assert {key: row[key] for key in CANDIDATE} == CANDIDATE


def test_no_rows_are_a_table_too() -> None:
    assert table([], PAIR).schema == PAIR


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"promt": "x"}, r"columns \['promt'\] are not in the schema"),
        ({"query": None}, "column query is null"),
        ({"candidate_id": None}, "column candidate_id is null"),
        ({"query": 3}, "does not fit"),
        ({"query": b"\xff"}, "does not fit"),
        ({"prompt": "\ud800"}, "does not fit"),
        ({"k": "1"}, "does not fit"),
        ({"k": 1.5}, "does not fit"),
        ({"k": True}, "does not fit"),
        ({"k": 2**31}, "does not fit"),
        ({"seed": 2**63}, "does not fit"),
        ({"score": "high"}, "does not fit"),
        ({"unsafe": "yes"}, "does not fit"),
        ({"seconds": 1.0}, "does not fit"),
        ({"answers": [1]}, "does not fit"),
        ({"answers": {"question": 1}}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        table([CANDIDATE, {**CANDIDATE, **change}], FEEDBACK)


def test_one_missing_key_is_refused_however_many_rows_have_it() -> None:
    good = {"query_id": "a", "query": "b", "split": "dpo"}
    with pytest.raises(ValueError, match="column split is null"):
        table([good, {"query_id": "c", "query": "d"}], QUERY)


@quick
@given(TEXT)
def test_any_text_comes_back_as_it_was(text: str) -> None:
    row = {**CANDIDATE, "query": text, "prompt": text}
    stored = table([row], FEEDBACK).to_pylist()[0]
    assert (stored["query"], stored["prompt"]) == (text, text)


def test_an_error_always_fits_its_row() -> None:
    """The text of an error may come from anywhere: a file name, a model's answer."""
    row = failed(CANDIDATE, "judge", "bad \ud800 " + "x" * 10_000)
    stored = table([row], FEEDBACK).to_pylist()[0]
    assert stored["error_stage"] == "judge"
    assert stored["error"].startswith("bad ? x")
    assert len(stored["error"]) <= 2000
    assert "error" not in CANDIDATE
