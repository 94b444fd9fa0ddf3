"""`vpo evaluate`: the policy before DPO and the one after it, on queries that nothing was trained on.

The queries are those of the `eval` split. Each policy gets a run directory of its own in
`evaluation/<policy>`, where one prompt a query is sampled, judged, rendered and scored by the same
pipeline; both videos of a query share seed and settings. It goes on where it stopped, and finds
everything done when it is done.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict
from typing import Any

import pyarrow.compute as pc

from vpo_ray.files.folder import chunks, join
from vpo_ray.loop.opening import accounted, opened, write_ledger
from vpo_ray.loop.phases import generate_feedback, starting_policy
from vpo_ray.loop.policies import LoopError, Start, dpo_id
from vpo_ray.recipe import Recipe
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import CURATED, ROUND, RunDir
from vpo_ray.storage.run_lock import driving

logger = logging.getLogger(__name__)

RESULT = "evaluation.json"
_QUERIES_PER_PART = 10_000


def evaluate(recipe: Recipe, run: RunDir, retry_errors: bool = False) -> dict[str, Any]:
    """Compare the two policies; the result is also written to `evaluation.json` of the run.

    Returns:
        `queries`; for `before` and `after` their `policy`, the counts of `verdicts` and `errors`, and
        the mean `score` of what was scored; `compared`, queries with a score of both, of which the
        score after is `better`, `equal` or `worse`, and the mean `difference` (after - before).

    Raises:
        LoopError: there is no trained policy, or no query in the eval split.
        PlacementError, GenerationError: see `pipeline.generate`.
        RunInUseError, RunLostError: see `run_lock.driving`.
    """
    with driving(run.uri):
        return _evaluate(recipe, run, retry_errors)


def _evaluate(recipe: Recipe, run: RunDir, retry_errors: bool) -> dict[str, Any]:
    queries = list(run.table("queries").rows(where=pc.field("split") == "eval"))
    if not queries:
        raise LoopError(
            f"{run.at('queries')} has no query of the eval split: give queries.splits.eval a share"
        )
    scores: dict[str, dict[str, float]] = {}
    result: dict[str, Any] = {"queries": len(queries)}
    for name, start in _policies(recipe, run).items():
        rows = _answers(recipe, run, queries, start, retry_errors)
        scores[name] = {row["query_id"]: row["score"] for row in rows if row["score"] is not None}
        result[name] = {"policy": start.policy, "identity": start.identity, **_counts(rows)}
    result |= compare(scores["before"], scores["after"])
    run.write_json(RESULT, result)
    return result


def compare(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Scores by query of the two policies, on the queries that have both."""
    differences = [after[query] - before[query] for query in sorted(before.keys() & after.keys())]
    return {
        "compared": len(differences),
        "better": sum(d > 0 for d in differences),
        "equal": sum(d == 0 for d in differences),
        "worse": sum(d < 0 for d in differences),
        "difference": sum(differences) / len(differences) if differences else None,
    }


def summary(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    lines = []
    for name in ("before", "after"):
        found = result[name]
        verdicts = ", ".join(f"{n} {verdict}" for verdict, n in found["verdicts"].items()) or "no verdict"
        score = "none scored" if found["score"] is None else f"mean score {found['score']:.4g}"
        lines.append(f"{name:<8} {verdicts}; {found['errors']} failed; {score}")
    if result["compared"]:
        lines.append(
            f"after DPO {result['better']} of {result['compared']} videos score better, "
            f"{result['worse']} worse, {result['equal']} the same; "
            f"mean difference {result['difference']:+.4g}"
        )
    else:
        lines.append("no query has a score of both policies: nothing can be compared")
    return "\n".join(lines) + "\n"


def _policies(recipe: Recipe, run: RunDir) -> dict[str, Start]:
    """The policy that sampled the run's pairs, and what DPO made of it; neither is trained here."""
    needed = [phase for phase in ("sft", "dpo") if phase == "dpo" or recipe.sft is not None]
    for phase in needed:
        if not run.exists(f"checkpoints/{phase}/vpo.json"):
            raise LoopError(f"{run.at(f'checkpoints/{phase}')} is not there: train first (`vpo {phase}`)")
    if recipe.dpo is not None and recipe.dpo.lora is not None and not recipe.dpo.lora.merge:
        raise LoopError("vpo evaluate needs dpo.lora.merge true: candidates are sampled from a whole model")
    before = starting_policy(recipe, run)
    return {"before": before, "after": Start(run.at("checkpoints/dpo"), dpo_id(recipe, run, before))}


def _answers(recipe: Recipe, run: RunDir, queries: list[Row], start: Start, retry_errors: bool) -> list[Row]:
    """One finished row a query by this policy."""
    own = recipe.model_copy(
        update={
            "out": join(run.uri, f"evaluation/{start.identity}"),
            "sample": recipe.sample.model_copy(update={"k": 1}),
            # There is no pair to save videos for.
            "render": recipe.render.model_copy(
                update={"store": recipe.render.store or run.at("videos"), "strategy": "all"}
            ),
        }
    )
    logger.info("evaluate: %s", start.policy)
    with opened(own) as folder:
        with accounted(own, folder):
            folder.write_json(ROUND, {"evaluates": run.uri, "start": asdict(start)})
            if not folder.exists(CURATED):
                for part in chunks(({**row, "split": "dpo"} for row in queries), _QUERIES_PER_PART):
                    folder.table("queries").append(part)
                folder.write_json(CURATED, {"queries": len(queries), "dropped": 0})
            generate_feedback(own, folder, start, retry_errors=retry_errors)
        write_ledger(own, folder)
    return list(folder.table("feedback").rows(["query_id", "verdict", "score", "error"]))


def _counts(rows: list[Row]) -> dict[str, Any]:
    verdicts: Counter[str] = Counter()
    for row in rows:
        if row["error"] is None:
            verdicts[row["verdict"] or "none"] += 1
    scores = [row["score"] for row in rows if row["score"] is not None]
    return {
        "verdicts": dict(sorted(verdicts.items())),
        "errors": sum(row["error"] is not None for row in rows),
        "score": sum(scores) / len(scores) if scores else None,
    }
