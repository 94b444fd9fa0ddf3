"""Conditions of a prompt: one wording wherever a policy is asked, and what can be counted of an answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.prompts.conditions import HEADING, LANGUAGE_NAMES, NONE, Conditions, asked_of, conditioned, kinds
from vpo_ray.prompts.scripts import LANGUAGES

TERMS = st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1), max_size=3).map(tuple)
CONDITIONS = st.builds(
    Conditions,
    language=st.none() | st.sampled_from(sorted(LANGUAGE_NAMES)),
    max_words=st.none() | st.integers(1, 500),
    keep=TERMS,
    avoid=TERMS,
    fields=st.lists(st.sampled_from(["subject", "scene", "style"]), unique=True).map(tuple),
)
JSON = Conditions(fields=("subject", "scene"))


def test_the_wording_never_changes() -> None:
    """Policies learnt it, and ids of candidates follow from it."""
    every = Conditions("fr", 40, ("ACME cola",), ("8k", "masterpiece"), ("subject", "scene"))
    assert conditioned("a red ball", every) == (
        "a red ball\n\n"
        "Conditions of the prompt; they come before what is said elsewhere of language, length and form:\n"
        "- Write it in French.\n"
        "- Write at most 40 words.\n"
        '- Have in it, as they are: "ACME cola".\n'
        '- Do not have in it: "8k", "masterpiece".\n'
        '- Write one JSON object and nothing else, with the texts "subject", "scene".'
    )
    assert Conditions(max_words=1).lines() == ["Write at most 1 word."]


def test_every_language_that_is_checked_has_a_name() -> None:
    assert LANGUAGE_NAMES.keys() == LANGUAGES


@given(CONDITIONS)
def test_a_row_holds_them_as_they_are(conditions: Conditions) -> None:
    stored = conditions.dump()
    assert Conditions.stored(stored) == conditions
    assert (stored is None) == (conditions == NONE) == (not conditions)
    assert asked_of({"query": "q", "conditions": stored}) == conditioned("q", conditions)


def test_without_conditions_the_query_is_asked_as_it_is() -> None:
    assert conditioned("a\nb", NONE) == asked_of({"query": "a\nb"}) == "a\nb"


@given(TERMS.filter(bool))
def test_a_callers_words_open_no_line_of_their_own(terms: tuple[str, ...]) -> None:
    text = Conditions(keep=terms, avoid=terms).text()
    assert len(text.split("\n")) == 3
    assert text.startswith(HEADING)


@pytest.mark.parametrize(
    ("prompt", "unmet"),
    [
        ('{"subject": "a cat", "scene": "a roof"}', []),
        ('{"scene": "a roof",\n "subject": "a cat"}', []),
        ('{"subject": "a cat"}', ["format: no JSON object with its texts alone"]),
        ('{"subject": "a cat", "scene": 3}', ["format: no JSON object with its texts alone"]),
        ('{"subject": "a cat", "scene": "a", "more": "b"}', ["format: no JSON object with its texts alone"]),
        ('Here it is: {"subject": "a cat", "scene": "a"}', ["format: no JSON object with its texts alone"]),
        ('{"subject": "a cat", "scene": " "}', ["format: no text in scene"]),
        ("a cat on a roof", ["format: no JSON object with its texts alone"]),
    ],
)
def test_a_caption_in_json_has_a_text_for_each_field(prompt: str, unmet: list[str]) -> None:
    assert JSON.unmet(prompt) == unmet


def test_the_other_conditions_are_about_the_texts_of_a_caption() -> None:
    asked = Conditions("en", 3, ("cat",), ("scene",), ("subject", "scene"))
    assert asked.unmet('{"subject": "a cat", "scene": "roof"}') == []
    found = asked.unmet('{"subject": "собака на крыше", "scene": "a scene"}')
    assert found == ["keep: cat", "avoid: scene", "language: en", "max_words: 5"]
    assert kinds(found) == "keep, avoid, language, max_words"


def test_a_caption_has_one_form() -> None:
    one = '{"subject": "a \\"red\\" cat — 猫", "scene": "a roof"}'
    shapes = ['{\n  "scene": "a\\nroof ",\n  "subject": "a \\"red\\" cat — \\u732b"\n}', one]
    assert {JSON.shaped(text) for text in shapes} == {one}
    assert list(json.loads(one)) == ["subject", "scene"]
    for other in ("a cat", '{"subject": "a cat"}', '{"scene": "", "subject": "a"}'):
        assert JSON.shaped(other) == other
    assert Conditions(max_words=3).shaped('{ "a": 1 }') == '{ "a": 1 }'
