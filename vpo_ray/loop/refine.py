"""`vpo refine`: the prompts of one query, evolved now; the best that a budget of videos finds, and a trace.

A query has a run directory of its own, `<out>/refined/<id>`, whose name says all that the result depends on.
Asked again, it is read from there: nothing is paid for twice, and what was stopped goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vpo_ray.files.folder import join
from vpo_ray.loop.evolution import Evolving
from vpo_ray.loop.opening import accounted, opened, write_ledger
from vpo_ray.loop.policies import LoopError
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Evolve, Recipe
from vpo_ray.records import Row, content_id, normalise, query_id
from vpo_ray.stages.evolution import NONE_BETTER, videos_of
from vpo_ray.storage.run_dir import CURATED, RunDir
from vpo_ray.stream.connection import connect

_SECTIONS = ("seed", "evolve", "judge", "render", "reward", "more_rewards")


@dataclass(frozen=True)
class Refined:
    """What the evolution of one query found.

    Args:
        prompt: the best; the query itself, where no prompt is better.
        fault: why it is the query itself.
        ended: why the evolution ended.
        trace: rows of EVOLUTION, the query first.
        folder: URI of the run directory.
    """

    query: str
    prompt: str
    fault: str | None
    ended: str | None
    trace: Sequence[Row]
    folder: str

    @property
    def videos(self) -> int:
        return videos_of(self.trace)


def refine(
    recipe: Recipe, query: str, budget: int, retry_errors: bool = False, verbose: bool = False
) -> Refined:
    """Evolve the prompts of one query, or read what was found for it before.

    Args:
        budget: videos at most, the query's own among them.
        retry_errors: take prompts that failed once more.
        verbose: see `connection.connect`.

    Raises:
        LoopError: the query is empty, or no prompt of it passes; the message counts why.
        PlacementError, GenerationError, OtherRecipeError: see `streams.through`.
    """
    text = normalise(query)
    if not text:
        raise LoopError("the query is empty")
    own = _of_query(recipe, text, budget)
    with opened(own) as run, accounted(own, run):
        if not run.exists(CURATED):
            row = {"query_id": query_id(text), "query": text, "source": "refine", "split": "sft"}
            run.table("queries").append([row])
            run.write_json(CURATED, {"queries": 1, "dropped": 0})
        evolving = Evolving(own, run)
        if retry_errors or not evolving.is_done():
            connect(verbose)
            evolving.run_all(retry_errors)
            write_ledger(own, run)
        return _found(text, run, list(evolving.rows()))


def _of_query(recipe: Recipe, query: str, budget: int) -> Recipe:
    """The recipe of the query's run directory."""
    settings = (recipe.evolve or Evolve.model_validate({})).model_dump(exclude={"llm"})
    llm = recipe.evolve.llm if recipe.evolve is not None else None
    asked = Evolve.model_validate({**settings, "llm": llm, "budget": budget})
    store = recipe.render.store or RunDir(recipe.out).at("videos")
    own = recipe.model_copy(
        update={
            "evolve": asked,
            "render": recipe.render.model_copy(update={"store": store, "strategy": "all", "preview": None}),
            "sft": None,
            "dpo": None,
            "rl": None,
            "evaluate": None,
        }
    )
    words = [read_prompt(name) for name in (asked.prompt, recipe.judge.critique_prompt)]
    identity = content_id("refined", query_id(query), own.fingerprint(*_SECTIONS), words)
    return own.model_copy(update={"out": join(RunDir(recipe.out).uri, f"refined/{identity}")})


def _found(query: str, run: RunDir, trace: list[Row]) -> Refined:
    best = next((row["prompt"] for row in trace if row["target"]), None)
    fault, ended = trace[0]["fault"], trace[0]["ended"]
    if best is None and fault != NONE_BETTER:
        reasons = Counter(f"{row['error_stage']}: {row['error']}" for row in trace if row["error"])
        reasons.update(
            f"judged {row['verdict']}" for row in trace[1:] if row["verdict"] not in (None, "aligned")
        )
        reasons.update(row["skipped"] for row in trace if row["skipped"] is not None)
        listed = "".join(f"\n  {count:3} {reason}" for reason, count in reasons.most_common())
        raise LoopError(f"no prompt was found: {fault}{listed}\nThe trace is in {run.at('evolutions')}")
    return Refined(query, best or query, fault, ended, trace, run.uri)
