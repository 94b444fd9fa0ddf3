"""Candidates are named and seeded by what is asked, so that a larger run keeps what a smaller made."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from vpo_ray.engines.chat import Answer, Message, Sampling
from vpo_ray.recipe import Engine, Pool, Sample
from vpo_ray.records import FEEDBACK, Row, query_id, table
from vpo_ray.stages.sample import Sampler, candidates

SETTINGS = Sample(k=4, temperature=0.9, top_p=0.9, max_tokens=100)


def query(text: str) -> Row:
    return {"query_id": query_id(text), "query": text, "source": "x", "split": "dpo", "unsafe": None}


def expand(*texts: str, policy: str = "policy", seed: int = 7, **changes: Any) -> list[Row]:
    settings = SETTINGS.model_copy(update=changes)
    return [row for text in texts for row in candidates(query(text), settings, policy, seed)]


def ids(*texts: str, **changes: Any) -> list[str]:
    return [row["candidate_id"] for row in expand(*texts, **changes)]


def test_k_rows_a_query_each_its_own() -> None:
    rows = expand("a cat", "a dog")
    assert [(row["query"], row["k"]) for row in rows] == [
        (t, k) for t in ("a cat", "a dog") for k in range(4)
    ]
    assert len({row["candidate_id"] for row in rows}) == len({row["seed"] for row in rows}) == 8
    assert table(rows, FEEDBACK).num_rows == 8


def test_ids_and_seeds_never_change() -> None:
    """A stored run is resumed by them."""
    assert [(row["candidate_id"], row["seed"]) for row in expand("a cat")[:2]] == [
        ("9cfadee8336165d43b4ea1a63070f738", 2056049062),
        ("da3be2942b7f3e64276c69d8fe5e803d", 463190931),
    ]


@pytest.mark.parametrize(
    "change",
    [{"temperature": 1.0}, {"top_p": 0.8}, {"top_k": 50}, {"max_tokens": 99}, {"policy": "b"}, {"seed": 8}],
)
def test_whatever_changes_the_text_changes_every_id(change: dict[str, Any]) -> None:
    assert set(ids("a cat", **change)).isdisjoint(ids("a cat"))


@pytest.mark.parametrize("change", [{"pool": Pool(size=(1, 8))}, {"engine": Engine(max_num_seqs=1)}])
def test_how_it_is_run_changes_none(change: dict[str, Any]) -> None:
    assert ids("a cat", **change) == ids("a cat")


def test_more_queries_or_candidates_keep_those_there_are() -> None:
    assert ids("new", "a cat", "another")[4:8] == ids("a cat")
    assert ids("a cat", k=6)[:4] == ids("a cat")
    assert ids("a cat", k=2) == ids("a cat")[:2]


class Endpoint:
    """Stands for the LLM service outside."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked: list[tuple[Sequence[Message], Sampling]] = []

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        assert schema is None
        self.asked.append((messages, sampling))
        return Answer(self.text, "length", 12, 34)


def sample(text: str) -> tuple[Row, Endpoint]:
    row = {**dict.fromkeys(FEEDBACK.names), **expand("a {query} <|eot_id|> cat")[1]}
    endpoint = Endpoint(text)
    return asyncio.run(Sampler(SETTINGS)(row, endpoint)), endpoint


def test_the_query_is_asked_as_it_is_with_the_seed_of_its_row() -> None:
    row, endpoint = sample(" a prompt\n")
    [(messages, sampling)] = endpoint.asked
    assert messages == [{"role": "user", "content": "a {query} <|eot_id|> cat"}]
    assert sampling == Sampling(temperature=0.9, top_p=0.9, top_k=-1, max_tokens=100, seed=row["seed"])
    assert (row["prompt"], row["finish_reason"]) == ("a prompt", "length")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (12, 34)


@pytest.mark.parametrize(
    "text",
    ["<think>\nA cat?\n</think>\n\na prompt", "A cat?\n</think>a prompt", "◁think▷hm◁/think▷ a prompt\n"],
)
def test_thoughts_are_no_part_of_the_prompt(text: str) -> None:
    assert sample(text)[0]["prompt"] == "a prompt"


def test_an_answer_that_ends_within_a_thought_is_an_error_of_its_row() -> None:
    row, _ = sample("<think>\nThe user wants a cat, so")
    assert (row["prompt"], row["error_stage"]) == (None, "sample")
    assert "ends within a thought: raise max_tokens" in row["error"]


@pytest.mark.parametrize("text", ["", " \n\t", "<think>a cat</think>\n"])
def test_an_empty_answer_is_an_error_of_its_row(text: str) -> None:
    row, _ = sample(text)
    assert (row["prompt"], row["error_stage"], row["error"]) == (
        None,
        "sample",
        "the policy's answer is empty",
    )


@pytest.mark.parametrize(
    ("more", "wanted"), [({}, True), ({"prompt": "x"}, False), ({"error": "boom"}, False)]
)
def test_which_rows_are_sampled(more: Row, wanted: bool) -> None:
    row = {**dict.fromkeys(FEEDBACK.names), **expand("a cat")[0], **more}
    assert Sampler(SETTINGS).wants(row) is wanted
