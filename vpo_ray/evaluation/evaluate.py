"""`vpo evaluate`: policies side by side, on queries that nothing was trained on.

Every part goes on where it stopped: prompts, verdicts, videos and preferences are run directories in
`<run>/evaluation`, and what is computed from them is written to `evaluation/<id>`: `samples` and
`comparisons` as tables, and `results.json`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from vpo_ray.evaluation import grid
from vpo_ray.evaluation.figures import results_of
from vpo_ray.evaluation.people import votes_table
from vpo_ray.evaluation.policies import Rival, default_policies, prompts_of, rivals
from vpo_ray.evaluation.preferences import What, prefer
from vpo_ray.evaluation.prompt_measures import guard, prompt_measures
from vpo_ray.evaluation.samples import COMPARISON, SAMPLE
from vpo_ray.evaluation.sets import read_set, refuse_trained, set_hash
from vpo_ray.evaluation.vbench_files import import_vbench
from vpo_ray.keywords import KeywordList
from vpo_ray.loop.alongside import alongside
from vpo_ray.prompts.conditions import Conditions
from vpo_ray.recipe import Evaluation, Formula, Recipe, Render, Reward, sources
from vpo_ray.records import Row, content_id
from vpo_ray.stages.formula import raw_values, weigh
from vpo_ray.stages.profiles import asked_alone, profiled
from vpo_ray.storage.run_dir import LATEST, RunDir
from vpo_ray.storage.run_lock import driving
from vpo_ray.storage.run_state import working
from vpo_ray.storage.tables import Table
from vpo_ray.stream.placement import pool_shapes, room_for
from vpo_ray.versions import versions

logger = logging.getLogger(__name__)

RESULTS = "results.json"
VBENCH = "vbench.json"  # measures of VBench's own command, by sample
FORMULA = "formula"  # the measure, and what is called so in `measures`
OWN = "render"  # the recipe's own video model, among those of `transfer`
_TRAINED = ("sft", "dpo", "rl")


@dataclass(frozen=True)
class Evaluated:
    """An evaluation as it was written.

    Args:
        folder: with `results.json`, `samples` and `comparisons`.
        queries: of its sets, each once.
    """

    folder: RunDir
    results: dict[str, Any]
    queries: list[Row]

    def samples(self) -> list[Row]:
        return list(samples_of(self.folder).rows())

    def comparisons(self) -> list[Row]:
        return list(comparisons_of(self.folder).rows())


def samples_of(folder: RunDir) -> Table:
    return Table(folder.at("samples"), SAMPLE, "sample_id")


def comparisons_of(folder: RunDir) -> Table:
    return Table(folder.at("comparisons"), COMPARISON, "comparison_id")


def evaluate(
    recipe: Recipe, run: RunDir, retry_errors: bool = False, vbench: Sequence[str] = ()
) -> Evaluated:
    """Compare policies as the recipe's `evaluate` section says: the user's words, the policy before and the
    one after DPO on the eval split where it has none.

    Raises:
        LoopError: a policy is not trained.
        SetError: a set or a file of prompts is not what it should be, or holds what was trained on.
        PlacementError, GenerationError: see `pipeline.generate`.
        RunInUseError, RunLostError: see `run_lock.driving`.
    """
    with driving(run.uri), working(run):
        return _Evaluating(recipe, run, retry_errors, vbench).run_all()


class _Evaluating:
    def __init__(self, recipe: Recipe, run: RunDir, retry_errors: bool, vbench: Sequence[str]) -> None:
        self.vbench = vbench
        given = recipe.evaluate or Evaluation.model_validate({})
        policies = given.policies or default_policies(recipe, run)
        self.settings = given.model_copy(update={"policies": policies})
        self.recipe, self.run, self.retry_errors = recipe, run, retry_errors
        under = asked_alone(recipe.profiles, self.settings.profile)
        self.sets = {name: read_set(name, entry, run) for name, entry in self.settings.sets.items()}
        self.queries = {
            row["query_id"]: {**row, **profiled(row, under, recipe.seed)}
            for rows in self.sets.values()
            for row in rows
        }
        self.rivals = rivals(recipe, run, self.settings, list(self.queries.values()))
        if any(rival.settings.kind in _TRAINED for rival in self.rivals):
            for name, rows in self.sets.items():
                refuse_trained(name, rows, run)
        self.rewards, self.absent = _present(self.settings.rewards)
        self.video_models: dict[str, Render] = {}
        if self.settings.videos:
            self.video_models = {OWN: recipe.render, **self.settings.transfer}

    def run_all(self) -> Evaluated:
        made = self._prompts()
        prompts = {
            (query, row["prompt"]): self.queries[query]
            for rows in made.values()
            for query, row in rows.items()
            if row["prompt"] is not None and row["error"] is None
        }
        judged = grid.verdicts(self.recipe, self.run, self.settings, prompts, self.retry_errors)
        rendered = {
            (model, seed): self._videos(render, made, judged, seed)
            for model, render in self.video_models.items()
            for seed in range(self.settings.seeds)
        }
        samples = list(self._samples(made, judged, rendered))
        if self.recipe.formula is not None:
            add_formula(samples, self.recipe.formula)
        comparisons = self._comparisons(samples)
        return self._written(samples, comparisons)

    def _prompts(self) -> dict[tuple[str, int], dict[str, Row]]:
        """What each policy makes of the queries, by policy and seed. Models are asked two at a time where the
        cluster has room for both: while one is loaded, the other writes."""
        made: dict[tuple[str, int], dict[str, Row]] = {}

        def ask(rivals: Iterable[Rival], stop: threading.Event | None = None) -> None:
            for rival in rivals:
                for seed in range(self.settings.seeds):
                    made[rival.name, seed] = prompts_of(
                        rival, self.recipe, self.run, queries, seed, self.retry_errors, stop
                    )

        queries = list(self.queries.values())
        models: dict[str, list[Rival]] = {}
        for rival in self.rivals:
            if rival.start is not None:
                models.setdefault(rival.identity, []).append(rival)  # they share their run directories
        beside = [rival for group in list(models.values())[1::2] for rival in group]
        if not beside or not room_for(2 * pool_shapes(self.recipe, ["sample"])):
            ask(self.rivals)
        else:
            with alongside(partial(ask, beside)):
                ask(rival for rival in self.rivals if rival not in beside)
        return made

    def _videos(
        self,
        render: Render,
        made: Mapping[tuple[str, int], Mapping[str, Row]],
        judged: Mapping[str, Row],
        seed: int,
    ) -> dict[str, Row]:
        wanted = {
            key: self.queries[key[0]]
            for (_, number), rows in made.items()
            if number == seed
            for key in ((query, row["prompt"]) for query, row in rows.items() if row["error"] is None)
            if self._why_skipped(judged.get(grid.prompt_id(key))) is None
        }
        rewards = self.rewards
        return grid.videos(self.recipe, self.run, render, rewards, wanted, seed, self.retry_errors)

    def _why_skipped(self, judgement: Row | None) -> str | None:
        unsafe = judgement is not None and judgement["verdict"] == "unsafe"
        return "unsafe: not rendered" if unsafe and not self.settings.render_unsafe else None

    def _samples(
        self,
        made: Mapping[tuple[str, int], Mapping[str, Row]],
        judged: Mapping[str, Row],
        rendered: Mapping[tuple[str, int], Mapping[str, Row]],
    ) -> Iterator[Row]:
        required, unsafe = (
            None if path is None else KeywordList.read(path)
            for path in (self.settings.required_words, self.settings.unsafe_words)
        )
        measures = partial(prompt_measures, required=required, unsafe_words=unsafe)
        for set_name, queries in self.sets.items():
            for rival in self.rivals:
                for model in self.video_models or [OWN]:
                    for seed in range(self.settings.seeds):
                        for query in queries:
                            answer = made[rival.name, seed][query["query_id"]]
                            yield {
                                **_place(set_name, rival.name, model, query, seed),
                                **self._sample(query, answer, judged, rendered.get((model, seed)), measures),
                            }

    def _sample(
        self,
        query: Row,
        answer: Row,
        judged: Mapping[str, Row],
        rendered: Mapping[str, Row] | None,
        measures: Callable[..., dict[str, float | None]],
    ) -> Row:
        error = {name: answer[name] for name in ("error", "error_stage")}
        prompt = answer["prompt"]
        if error["error"] is not None:
            refused = error["error"].startswith("Refusal")
            return (
                {"verdict": "refusal", "critique": error["error"], "skipped": "refusal: no prompt"}
                if refused
                else error
            )
        identity = grid.prompt_id((query["query_id"], prompt))
        judgement = judged[identity]
        conditions = Conditions.stored(self.queries[query["query_id"]].get("conditions"))
        values = measures(query["query"], prompt, conditions=conditions)
        row: Row = {
            "prompt": prompt,
            "verdict": judgement["verdict"],
            "critique": judgement["critique"],
            "error": judgement["error"],
            "error_stage": judgement["error_stage"],
        }
        if rendered is not None:
            row["skipped"] = self._why_skipped(judgement)
            video = rendered.get(identity)
            if video is not None:
                row |= {name: video[name] for name in ("video_key", "video_uri")}
                if video["error"] is not None:
                    row |= {name: video[name] for name in ("error", "error_stage")}
                values |= raw_values(video)
        row["measures"] = [{"name": name, "value": value} for name, value in values.items()]
        return row

    def _comparisons(self, samples: Sequence[Row]) -> list[Row]:
        if self.settings.guard is not None:
            unsafe = guard(self.recipe, self.run, samples, self.retry_errors)
            for row in samples:
                if (found := unsafe.get(row["prompt"] or "")) is not None:
                    _add(row, {"prompt.guard_unsafe": float(found)})
        asked: list[What] = ["prompt"] if self.settings.prefer_prompts is not None else []
        asked += ["video"] if self.settings.prefer_videos is not None else []
        return [
            row for what in asked for row in prefer(self.recipe, self.run, samples, what, self.retry_errors)
        ]

    def _written(self, samples: Sequence[Row], comparisons: Sequence[Row]) -> Evaluated:
        context = self._context()
        folder = RunDir(self.run.at(f"evaluation/{context['id']}"))
        imported = self._imported(folder, samples)
        for row in samples:
            _add(row, imported.get(row["sample_id"], {}))
        samples_of(folder).replace(samples, rows_per_part=10_000)
        comparisons_of(folder).replace(comparisons, rows_per_part=10_000)
        people = list(votes_table(folder).rows())
        results = results_of(samples, comparisons, self.settings, context, people)
        folder.write_json(RESULTS, results)
        self.run.write_json(LATEST, {"id": context["id"], "results": f"evaluation/{context['id']}/{RESULTS}"})
        return Evaluated(folder, results, list(self.queries.values()))

    def _imported(self, folder: RunDir, samples: Sequence[Row]) -> dict[str, dict[str, float]]:
        """VBench's measures by sample, of earlier commands too."""
        kept: dict[str, dict[str, float]] = folder.read_json(VBENCH) if folder.exists(VBENCH) else {}
        for path in self.vbench:
            for found in import_vbench(path, samples):
                for sample, values in found.measures.items():
                    kept[sample] = {**kept.get(sample, {}), **values}
                if found.total is not None:
                    where = f"{found.policy} by {found.video_model} on {found.set}"
                    logger.info("VBench's total of %s: %.4f", where, found.total)
        if self.vbench:
            folder.write_json(VBENCH, kept)
        return kept

    def _context(self) -> dict[str, Any]:
        """What the figures are of."""
        hashes = {name: set_hash(rows) for name, rows in self.sets.items()}
        identities = {rival.name: rival.identity for rival in self.rivals}
        config = self.settings.model_dump(mode="json", exclude_defaults=True)
        recipe = self.recipe.fingerprint()
        return {
            "id": content_id(recipe, config, hashes, identities, digits=16),
            "name": self.recipe.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "sets": {
                key: {"n": len(rows), "hash": hashes[key], "kind": self.settings.sets[key].kind}
                for key, rows in self.sets.items()
            },
            "policies": {rival.name: _shown(rival) for rival in self.rivals},
            "video_models": {key: render.model for key, render in self.video_models.items()},
            "training_rewards": ["reward", *self.recipe.more_rewards, FORMULA],
            "training_judge": self.recipe.judge.model,
            "warnings": [f"{name} is not measured: {why}" for name, why in self.absent.items()],
            "versions": versions(),
            "config": config,
            "hashes": {"recipe": recipe, "sets": hashes},
        }


def _shown(rival: Rival) -> dict[str, Any]:
    settings, checkpoint = rival.settings, None if rival.start is None else rival.start.policy
    given = {"round": settings.round, "times": settings.times if settings.times > 1 else None}
    return {
        "kind": settings.kind,
        "identity": rival.identity,
        "checkpoint": checkpoint,
        **{key: value for key, value in given.items() if value is not None},
    }


def _add(row: Row, values: Mapping[str, float]) -> None:
    row["measures"] = [
        *(row.get("measures") or []),
        *({"name": name, "value": value} for name, value in values.items()),
    ]


def _place(set_name: str, policy: str, model: str, query: Row, seed: int) -> Row:
    identity = content_id("sample", set_name, policy, model, query["query_id"], seed)
    return {
        **dict.fromkeys(SAMPLE.names),
        "sample_id": identity,
        "set": set_name,
        "category": query.get("category"),
        "policy": policy,
        "video_model": model,
        "query_id": query["query_id"],
        "query": query["query"],
        "unsafe": query["unsafe"],
        "seed": seed,
    }


def add_formula(samples: Sequence[Row], formula: Formula) -> None:
    """Give samples with scores the measure `formula`: its total, with the weights that hold in the end.

    Where it asks for more of a chosen video, `formula.accepted` is 1 if that is there, else 0.

    Values are normalised among all samples of a query with one video model, whose ever they are. A sample
    that a gate leaves out, or that lacks a dimension, has neither.
    """
    scored = [row for row in samples if any(measure["name"] == "reward" for measure in row["measures"] or ())]
    places: dict[tuple[str, str, str], int] = {}
    groups = [
        places.setdefault((row["set"], row["video_model"], row["query_id"]), len(places)) for row in scored
    ]
    values = [
        {measure["name"]: measure["value"] for measure in row["measures"] if measure["value"] is not None}
        for row in scored
    ]
    weighed = weigh(values, formula, groups)
    thresholds = any(term.above is not None for term in formula.terms.values())
    for row, total, out, refused in zip(scored, weighed.totals, weighed.out, weighed.refused, strict=True):
        if out is None:
            accepted = {f"{FORMULA}.accepted": float(refused is None)} if thresholds else {}
            _add(row, {FORMULA: float(total), **accepted})


def _present(rewards: Mapping[str, Reward]) -> tuple[dict[str, Reward], dict[str, str]]:
    """Measures whose models are here, and why the others are left out."""
    absent = {}
    for name, reward in rewards.items():
        for key, place in {**dict(sources(reward)), **reward.files(), **reward.models()}.items():
            local = place.startswith((".", "/")) or place.count("/") > 1
            if "://" not in place and local and not Path(place).exists():
                absent[name] = f"{key}: {place} is not there"
                logger.warning("evaluate.rewards.%s is left out: %s", name, absent[name])
    return {name: reward for name, reward in rewards.items() if name not in absent}, absent
