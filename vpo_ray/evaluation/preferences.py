"""What an LLM prefers of what two policies made of one query, in both orders: the rows of COMPARISON.

Nothing is asked where there is nothing to compare: who made no prompt or no video loses, and the same
prompt or video ties.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Literal

from vpo_ray.loop.streams import answers_of
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Evaluation, Preference, Recipe
from vpo_ray.recipe.result_keys import result_keys
from vpo_ray.records import Row, content_id
from vpo_ray.stages.prefer import match_row
from vpo_ray.storage.run_dir import RunDir

What = Literal["prompt", "video"]
_COMPARED = {"prompt": "prompt", "video": "video_key"}


def prefer(
    recipe: Recipe, run: RunDir, samples: Sequence[Row], what: What, retry_errors: bool = False
) -> list[Row]:
    """Rows of COMPARISON, two for every two samples that are compared, one an order.

    Videos of two policies are compared on one set, video model, query and seed. A policy has one prompt a
    query, so prompts are compared once a set and query.

    Args:
        samples: rows of SAMPLE. Where `against` is unset, a policy is compared with those that come later.

    Raises:
        PlacementError, GenerationError, OtherRecipeError: see `streams.through`.
    """
    assert recipe.evaluate is not None
    settings = recipe.evaluate.prefer_prompts if what == "prompt" else recipe.evaluate.prefer_videos
    assert settings is not None
    orders = [order for a, b in _pairs(samples, what, settings.against) for order in ((a, b), (b, a))]
    asked = [_match(a, b, what) for a, b in orders if _unasked(a, b, what) is None]
    rows = answers_of(_recipe(recipe, run, settings, what), run, "prefer", asked, retry_errors)
    answers = {row["preference_id"]: row for row in rows}
    by = settings.llm.model or settings.llm.backend
    return [_comparison(a, b, what, by, answers) for a, b in orders]


def _pairs(samples: Sequence[Row], what: What, against: str | None) -> Iterator[tuple[Row, Row]]:
    places: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(samples, key=lambda row: (row["video_model"] != "render", row["seed"])):
        where = (row["set"], row["query_id"])
        where += (row["video_model"], row["seed"]) if what == "video" else ()
        places.setdefault(where, {}).setdefault(row["policy"], row)
    policies = list(dict.fromkeys(row["policy"] for row in samples))
    for found in places.values():
        for a, b in combinations([found[name] for name in policies if name in found], 2):
            if against in (None, a["policy"]):
                yield a, b
            elif against == b["policy"]:
                yield b, a


def _unasked(a: Row, b: Row, what: What) -> str | None:
    """The answer that needs no question, or None."""
    first, second = a[_COMPARED[what]], b[_COMPARED[what]]
    if first == second:
        return "tie"
    return "b" if first is None else "a" if second is None else None


def _match(a: Row, b: Row, what: What) -> Row:
    uris = (a["video_uri"], b["video_uri"]) if what == "video" else None
    return match_row(a["query"], a["query_id"], a[_COMPARED[what]], b[_COMPARED[what]], uris)


def _recipe(recipe: Recipe, run: RunDir, settings: Preference, what: What) -> Recipe:
    """The recipe of the run directory that is asked in; another LLM or question is asked in another."""
    given = result_keys(settings.model_dump(mode="json", exclude_defaults=True, exclude={"against"}))
    words = read_prompt(settings.question) if settings.question is not None else ""
    identity = content_id("prefer", what, given, words, digits=16)
    alone = Evaluation.model_validate({f"prefer_{what}s": settings.model_copy(update={"against": None})})
    return recipe.model_copy(update={"out": run.at(f"evaluation/prefer-{identity}"), "evaluate": alone})


def _comparison(a: Row, b: Row, what: What, by: str, answers: Mapping[str, Row]) -> Row:
    place = {name: a[name] for name in ("set", "video_model", "query_id", "query", "seed")}
    row = {**place, "what": what, "by": by, "a": a["policy"], "b": b["policy"]}
    row["comparison_id"] = content_id("comparison", row)
    answer = _unasked(a, b, what)
    if answer is not None:
        return {**row, "answer": answer, "raw": None, "error": None}
    said = answers[_match(a, b, what)["preference_id"]]
    return {**row, **{name: said[name] for name in ("answer", "raw", "error")}}
