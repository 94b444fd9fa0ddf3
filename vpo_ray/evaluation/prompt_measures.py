"""Measures of a prompt: those that are counted, and the verdict of a guard model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vpo_ray.keywords import KeywordList
from vpo_ray.loop.streams import answers_of
from vpo_ray.prompts.conditions import NONE, Conditions
from vpo_ray.prompts.words import word_count
from vpo_ray.recipe import Judge, Recipe
from vpo_ray.recipe.result_keys import result_keys
from vpo_ray.records import Row, content_id, query_id
from vpo_ray.stages.curate.rules import language_of
from vpo_ray.storage.run_dir import RunDir

logger = logging.getLogger(__name__)


def prompt_measures(
    query: str,
    prompt: str,
    required: KeywordList | None = None,
    unsafe_words: KeywordList | None = None,
    conditions: Conditions = NONE,
) -> dict[str, float | None]:
    """Measures by name; None for one that this query does not allow to tell.

    `prompt.words` as `queries.rules` counts them, and `prompt.characters`; 1 or 0 for `prompt.language_kept`
    (None where the query or the prompt is too short to tell its language), and with a list for
    `prompt.required_kept` (1: the prompt has each of the list's words that its query has; None where that has
    none) and `prompt.unsafe_words` (1: it has one of them); with conditions for
    `prompt.profile_met` (1: the prompt meets them all).
    """
    asked, written = language_of(query), language_of(prompt)
    found: dict[str, float | None] = {
        "prompt.words": float(word_count(prompt)),
        "prompt.characters": float(len(prompt)),
        "prompt.language_kept": float(asked == written) if asked and written else None,
    }
    if required is not None:
        words = required.find_all(query)
        kept = all(KeywordList([word]).find(prompt) is not None for word in words)
        found["prompt.required_kept"] = float(kept) if words else None
    if unsafe_words is not None:
        found["prompt.unsafe_words"] = float(unsafe_words.find(prompt) is not None)
    if conditions:
        found["prompt.profile_met"] = float(not conditions.unmet(prompt))
    return found


def guard(recipe: Recipe, run: RunDir, samples: Sequence[Row], retry_errors: bool = False) -> dict[str, bool]:
    """Whether `evaluate.guard` calls a prompt unsafe, by its text; each is asked about once.

    A prompt without an answer is absent. The question is curation's (`builtin:safety`), by the stage `label`.

    Args:
        samples: rows of SAMPLE.

    Raises:
        PlacementError, GenerationError, OtherRecipeError: see `streams.through`.
    """
    own = _recipe(recipe, run)
    logger.info("evaluate.guard is asked as the judge of %s", own.out)
    ids = {row["prompt"]: query_id(row["prompt"]) for row in samples if row["prompt"] is not None}
    rows = ({"query_id": key, "query": prompt, "split": "eval"} for prompt, key in ids.items())
    labels = {row["query_id"]: row["unsafe"] for row in answers_of(own, run, "label", rows, retry_errors)}
    return {prompt: labels[key] for prompt, key in ids.items() if labels.get(key) is not None}


def _recipe(recipe: Recipe, run: RunDir) -> Recipe:
    """The recipe of the run directory that is asked in; another model is asked in another. Its answers have
    the judge's limits."""
    assert recipe.evaluate is not None
    assert recipe.evaluate.guard is not None
    limits = recipe.judge.model_dump(include={"critique_max_chars", "max_tokens"}, exclude_defaults=True)
    given = limits | recipe.evaluate.guard.model_dump(mode="json", exclude_defaults=True)
    asked = {"unsafe_judge": True, "unsafe_prompt": "builtin:safety"}
    return recipe.model_copy(
        update={
            "out": run.at(f"evaluation/guard-{content_id('guard', result_keys(given), digits=16)}"),
            "judge": Judge.model_validate(given),
            "queries": recipe.queries.model_copy(update=asked),
            "evaluate": None,
        }
    )
