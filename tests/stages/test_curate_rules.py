"""Rules drop a query under their own name; texts are cleaned and flags set aside before."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.recipe import Queries
from vpo_ray.stages.curate import Curated, InputError, RulesError, curate

REAL = Path(__file__).parents[3] / "shared/data/vpo/sft_prompts.json"


def run(tmp_path: Path, values: list[Any], **options: Any) -> Curated:
    path = tmp_path / "queries.json"
    path.write_text(json.dumps(values), "utf-8")
    return curate(Queries(path=str(path), **options))


def kept(curated: Curated) -> list[str]:
    return [text for part in curated.queries(100) for text in part["query"].to_pylist()]


def dropped(curated: Curated) -> dict[str, str]:
    return {row["excerpt"]: row["reason"] for part in curated.dropped(100) for row in part.to_pylist()}


@pytest.mark.parametrize(
    ("rules", "good", "bad", "reason"),
    [
        ({"min_words": 3}, ["a big cat", "大きい猫", "แมวดำ"], ["a cat", "猫犬"], "too few words"),
        ({"max_words": 3}, ["a big cat", "well-known 4k cat"], ["a big grey cat"], "too many words"),
        (
            {"max_special_share": 0.25},
            ["a cat.", "café, naïve", "हाथी नदी"],
            ["!!! a", "🌋🌊"],
            "special characters",
        ),
        ({"max_digits": 2}, ["4k, 2 cats"], ["in 1990", "٣٤٥ cats"], "too many digits"),
        ({"max_digits": 0}, ["cats"], ["4k"], "too many digits"),
        (
            {"urls": True},
            ["1.5 times", "end.of story"],
            ["see https://x.y/z", "www.cat.de", "by getty.com/cat", "S3://bucket/a", "site:cats.io"],
            "URL",
        ),
        (
            {"languages": ["en", "de"], "language_confidence": 0.4},
            ["cat", "a woman in a yellow raincoat waits for a bus", "Ein alter Leuchtturm im Sturm, am Meer"],
            ["девочка рисует на запотевшем окне", "un enfant court dans un champ de tournesols à l'aube"],
            "language",
        ),
    ],
)
def test_rules(tmp_path: Path, rules: dict[str, Any], good: list[str], bad: list[str], reason: str) -> None:
    curated = run(tmp_path, [*good, *bad], rules=rules)
    assert kept(curated) == good
    assert dropped(curated) == dict.fromkeys(bad, reason)
    # Off, they drop nothing.
    assert kept(run(tmp_path, [*good, *bad])) == [*good, *bad]


def test_keywords(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\ufeffGORE\nice  cream\n\n裸体\n  \nCafé\n", "utf-8")
    good = ["gored bull", "cream on ice", "vanilla ice-creams", "裸 体"]
    bad = ["Gore!", "some ICE-cream, please", "一个裸体的人", "cafe\u0301 noir", "ｇｏｒｅ"]
    curated = run(tmp_path, [*good, *bad], rules={"keywords": str(words)})
    assert kept(curated) == good
    assert list(dropped(curated).values()) == ["keyword"] * len(bad)


def test_rules_that_cannot_be_applied(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", "utf-8")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, says in ((tmp_path / "none.txt", "cannot read"), (empty, "no word"), (binary, "cannot read")):
        with pytest.raises(RulesError, match=says) as caught:
            run(tmp_path, ["a cat"], rules={"keywords": str(path)})
        assert str(path) in str(caught.value)
    with pytest.raises(RulesError, match=r"languages: english, xx not known; known are af, "):
        run(tmp_path, ["a cat"], rules={"languages": ["xx", "en", "english"]})


def test_a_query_that_breaks_several_rules_counts_once(tmp_path: Path) -> None:
    rules = {"min_words": 2, "max_digits": 0, "urls": True, "languages": ["en"]}
    values = ["1", "www.a.de 1", "www.a.de is a site", None, "the cat sits on the red mat"]
    assert run(tmp_path, values, rules=rules).counts() == {
        "too few words": 1, "too many digits": 1, "URL": 1, "null": 1, "dpo": 1,
    }  # fmt: skip


def test_html_and_spaces(tmp_path: Path) -> None:
    values = ["it&#39;s  a\n cat", "&nbsp;", "a &lt;b&gt; cat", "caf&#101;&#769;", "&#0;", "&amp;quot;x"]
    curated = run(tmp_path, values, unescape_html=True, collapse_spaces=True)
    assert kept(curated) == ["it's a cat", "a <b> cat", "café", "\ufffd", "&quot;x"]
    assert dropped(curated) == {"": "empty"}
    assert kept(run(tmp_path, values)) == values


def test_flags_are_set_aside(tmp_path: Path) -> None:
    values = ["a cat -ar 16:9 -neg blur, text", "a cat -motion 3", "a dog", "-gs 14", "a -ar 1:1"]
    curated = run(tmp_path, values, flags=True, min_chars=2)
    rows = [row for part in curated.queries(10) for row in part.to_pylist()]
    assert [(row["query"], [tuple(flag.values()) for flag in row["flags"]]) for row in rows] == [
        ("a cat", [("ar", "16:9"), ("neg", "blur, text")]),
        ("a dog", []),
    ]
    # With another flag it is the same query.
    assert curated.counts() == {"dpo": 2, "duplicate": 1, "only flags": 1, "too short": 1}
    assert [row["flags"] for part in run(tmp_path, values).queries(10) for row in part.to_pylist()] == [
        None
    ] * 5


def test_rules_see_the_text_without_flags(tmp_path: Path) -> None:
    curated = run(tmp_path, ["a cat -seed 123456", "1234567"], flags=True, rules={"max_digits": 3})
    assert kept(curated) == ["a cat"]


@pytest.mark.parametrize("text", ["\u200b", " \u200d\ufeff\u2060 ", "\u202e\u202c", "\u3000\u00a0"])
def test_text_that_shows_nothing(tmp_path: Path, text: str) -> None:
    assert run(tmp_path, [text, "a cat"]).counts() == {"empty": 1, "dpo": 1}


def test_right_to_left_and_zero_width_inside_stay(tmp_path: Path) -> None:
    values = ["قطة تنام على سجادة", "\u202eabc\u202c def", "👩\u200d👩\u200d👧 dance", "می\u200cخواهم"]
    assert kept(run(tmp_path, values, near_duplicates={})) == values


def test_a_query_of_a_megabyte(tmp_path: Path) -> None:
    long = "cat " * 250_000
    everything: dict[str, Any] = {
        "flags": True,
        "near_duplicates": {},
        "rules": {"languages": ["en"], "urls": True},
    }
    assert run(tmp_path, [long, "a cat"], **everything).counts() == {"too long": 1, "dpo": 1}
    assert run(tmp_path, [long, "a cat"], max_chars=2**21, **everything).counts() == {"dpo": 2}
    (row,) = next(run(tmp_path, [long, "a cat"]).dropped(10)).to_pylist()
    assert len(row["excerpt"]) == 200


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
def test_every_row_of_any_text_counts(tmp_path_factory: pytest.TempPathFactory, values: list[str]) -> None:
    rules = {"min_words": 2, "max_words": 5, "max_special_share": 0.5, "max_digits": 3, "urls": True}
    curated = run(
        tmp_path_factory.mktemp("q"), [*values, html.escape("a <cat>")], unescape_html=True,
        collapse_spaces=True, flags=True, rules=rules, near_duplicates={"ngram": 3},
    )  # fmt: skip
    assert curated.counts().total() == len(values) + 1


def test_all_rows_are_the_same(tmp_path: Path) -> None:
    assert run(tmp_path, ["a cat"] * 500, near_duplicates={}).counts() == {"dpo": 1, "duplicate": 499}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([True, 0.0], True), ([0.5], True), ([0.49, None], False), ([None, None], None), ([0, False], False),
        (["true"], True), (["Safe"], False), (["0.9", ""], True), ([1], True), ([""], None),
    ],
)  # fmt: skip
def test_labels(tmp_path: Path, labels: list[Any], said: bool | None) -> None:
    names = [f"label{number}" for number in range(len(labels))]
    row = {"query": "a cat", **dict(zip(names, labels, strict=True))}
    (found,) = next(run(tmp_path, [row], unsafe_columns=names).queries(10)).to_pylist()
    assert found["unsafe"] is said


def test_labels_that_are_none(tmp_path: Path) -> None:
    values = [
        {"query": f"a cat {n}", "label": label} for n, label in enumerate(["maybe", [1], "nan", 1e400, {}])
    ]
    assert run(tmp_path, [*values, {"query": "a dog"}, "a cow"], unsafe_columns=["label"]).counts() == {
        "bad unsafe label": 5,
        "dpo": 2,
    }
    (tmp_path / "q.txt").write_text("a cat", "utf-8")
    with pytest.raises(InputError, match=r"a text file has no columns, see queries\.unsafe_columns"):
        curate(Queries(path=str(tmp_path / "q.txt"), unsafe_columns=["label"]))


@pytest.mark.skipif(
    not REAL.exists(), reason="../shared/data/vpo/sft_prompts.json is not beside this checkout"
)
def test_counts_of_real_queries_by_rule() -> None:
    settings = Queries(
        path=str(REAL),
        unescape_html=True,
        flags=True,
        rules={"min_words": 3, "max_words": 100, "max_special_share": 0.25, "max_digits": 10, "urls": True,
               "languages": ["en"]},
        near_duplicates={"threshold": 0.7},
        splits={"sft": 0.4, "dpo": 0.4, "eval": 0.2},
    )  # fmt: skip
    counts = curate(settings).counts()
    assert counts.total() == 11_640
    assert counts == {
        "sft": 4570, "dpo": 4550, "eval": 2259,
        "too few words": 50, "too many words": 19, "too many digits": 36, "URL": 7, "language": 114,
        "duplicate": 3, "near duplicate": 32,
    }  # fmt: skip
