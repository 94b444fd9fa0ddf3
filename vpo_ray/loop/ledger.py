"""The ledger of a run: rows in, out, dropped, skipped and errored at every stage.

It is computed from the tables of the run directory, and what endpoints took from the run's account
(`spending`), and from nothing else, so it is right after any kill and any resume. At every stage
`in == out + dropped + skipped + errored`; `reconcile` names the stages where rows are not accounted
for (a run that was stopped has some in flight).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vpo_ray.loop.evolved import evolution_entry
from vpo_ray.loop.previewed import previews_entry
from vpo_ray.loop.unpaired import PairCount
from vpo_ray.recipe import Recipe
from vpo_ray.records import Row
from vpo_ray.stages import spec
from vpo_ray.stages.agreement import AgreementCount, compared, disagreements
from vpo_ray.stages.chains import CHAINS, Chain, chain_of, table_of_stage
from vpo_ray.stages.score import ALARM_AFTER
from vpo_ray.stages.spec import StageSpec
from vpo_ray.stages.tally import by_reason, reason_of
from vpo_ray.storage.run_dir import GIVEN, GROUPED, PAIRED, SFT_DROPPED, RunDir
from vpo_ray.storage.tables import Table
from vpo_ray.stream.spending import Charges, spent_at

Ledger = dict[str, Any]


def build_ledger(run: RunDir, recipe: Recipe) -> Ledger:
    """Count every stage of a run.

    Returns:
        A JSON-able dict: `name`, `fingerprint`, `paid` where endpoints took anything (see `_money`), and
        `stages` (curation, the stages of `spec` that the recipe has, pairing and training: `in`, `out`, and
        `dropped`, `skipped`, `errored` as counts by reason, `seconds` of work and `seconds_per_row`, and what
        is particular to the stage).
    """
    stages: dict[str, dict[str, Any]] = {"curate": _curate(run)}
    counts = {stage.name: _StageCount(stage) for stage in spec.stages() if stage.in_recipe(recipe)}
    pairs = PairCount(recipe.pair, recipe.formula and recipe.formula.at(run.round_number()))
    agreement = AgreementCount(compared(recipe))
    _count_rows(run, counts, [pairs, agreement] if agreement.signs else [pairs])
    given = run.read_json(GIVEN) if run.exists(GIVEN) else {}
    for chain in CHAINS.values():
        entered = _entering(run, chain, stages["curate"]["splits"], recipe)
        if given and chain.name == chain_of(given["stages"][0]).name:
            entered = given["rows"]
        for stage in spec.stages(chain.name):
            if stage.name in counts and (not given or stage.name in given["stages"]):
                stages[stage.name] = counts[stage.name].entry(entered)
                entered = stages[stage.name]["out"]
    if agreement.signs and "score" in stages:
        stages["score"]["agreement"] = agreement.result()
    if recipe.render.preview is not None and not given:
        at = list(stages).index("render")
        before, after = list(stages.items())[:at], list(stages.items())[at:]
        stages = dict([*before, ("preview", previews_entry(run, recipe)), *after])
    if recipe.evolve is not None and not given:
        stages["evolve"] = evolution_entry(run, stages["curate"]["splits"].get("sft", 0))
    made = {"group": _grouping(run)} if recipe.rl is not None else {"pair": _pairing(run, pairs)}
    stages |= made | {"sft": _training(run, "sft", run.table("sft").count())}
    if recipe.rl is not None:
        stages["rl"] = _training(run, "rl", stages["group"]["groups"])
    else:
        stages["dpo"] = _training(run, "dpo", stages["pair"]["pairs"])
    ledger = {"name": recipe.name, "fingerprint": recipe.fingerprint(), "stages": stages}
    return ledger | _money(run, stages)


def _money(run: RunDir, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put what the account says into the stages' entries: it knows of answers that no row mentions (of rows
    that failed and were tried again, and of the reward's). For a root run directory, the cost of the whole
    run and of each of its run directories, where anything was paid."""
    root, place = run.root()
    spent = spent_at(root, place or None)
    for stage, sums in spent[place].items():
        if stage in stages and sums.requests:
            stages[stage] |= {"requests": sums.requests, **sums.shown()}
    costs = {name or ".": sum(sums.cost for sums in found.values()) for name, found in sorted(spent.items())}
    if place or not sum(costs.values()):
        return {}
    each = {name: round(cost, 6) for name, cost in costs.items() if cost}
    return {"paid": {"cost": round(sum(costs.values()), 6), "runs": each}}


def reconcile(ledger: Ledger) -> list[str]:
    """One sentence for every stage whose rows do not add up; empty when all do."""
    problems = []
    for stage, entry in ledger["stages"].items():
        counts = {kind: sum(entry[kind].values()) for kind in ("dropped", "skipped", "errored")}
        missing = entry["in"] - entry["out"] - sum(counts.values())
        if missing:
            parts = " + ".join(f"{n} {kind}" for kind, n in {"out": entry["out"], **counts}.items())
            what = f"{missing} not accounted for" if missing > 0 else f"{-missing} too many"
            problems.append(f"{stage}: {entry['in']} in, but {parts}: {what}")
    return problems


def alarms(ledger: Ledger) -> list[str]:
    """What a person should look at before trusting the run: one sentence each."""
    found = []
    scored, cut = ledger["stages"]["score"], ledger["stages"]["render"].get("text_cut")
    if scored["score"] and scored["out"] >= ALARM_AFTER and scored["score"]["min"] == scored["score"]["max"]:
        found.append(
            f"all {scored['out']} videos got the score {scored['score']['min']:g}: look at reward.rule, the "
            "template and the tokenizer"
        )
    if cut and cut["videos"]:
        found.append(
            f"{cut['videos']} of {cut['of']} rendered prompts ({cut['videos'] / cut['of']:.0%}) were cut at "
            f"the video model's text length, by up to {cut['most_tokens']} tokens: it never saw their ends, "
            "so long prompts lose. Lower sample.max_tokens or ask for fewer words in policy.task_prompt; "
            "raise render.max_text_tokens where the model takes more; or leave such prompts out by "
            "render.long_prompts: error"
        )
    return [*found, *disagreements(scored.get("agreement", ()))]


def funnel(ledger: Ledger) -> dict[str, int]:
    """What became of the queries whose prompts evolved, where there are any, and of those that were sampled:
    candidates, aligned ones, previews where the recipe has them, videos, pairs or groups."""
    stages = ledger["stages"]
    evolved = stages.get("evolve", {})
    learnt = (
        {"groups": stages["group"]["groups"]} if "group" in stages else {"pairs": stages["pair"]["pairs"]}
    )
    return {
        **({"evolved": evolved["prompts"], "targets": evolved["out"]} if evolved.get("prompts") else {}),
        "queries": stages["curate"]["splits"].get("dpo", 0),
        "candidates": stages["sample"]["out"],
        "aligned": stages["judge"]["verdicts"].get("aligned", 0),
        **({"previews": stages["preview"]["out"]} if "preview" in stages else {}),
        "videos": stages["render"]["videos"],
        **learnt,
    }


def _entry(entered: int, left: int, **more: Any) -> dict[str, Any]:
    reasons: dict[str, Any] = {"dropped": {}, "skipped": {}, "errored": {}}
    return {"in": entered, "out": left, **reasons, "seconds": None, "seconds_per_row": None, **more}


def _curate(run: RunDir) -> dict[str, Any]:
    splits = Counter(row["split"] for row in run.table("queries").rows(["split"]))
    dropped = Counter(row["reason"] for row in run.table("dropped").rows(["reason"]))
    kept, by_split = splits.total(), dict(sorted(splits.items()))
    return _entry(kept + dropped.total(), kept, dropped=by_reason(dropped), splits=by_split)


def _entering(run: RunDir, chain: Chain, splits: dict[str, int], recipe: Recipe) -> int:
    """Rows that the first stage of a chain gets."""
    queries = run.table(chain.source).count() if chain.split is None else splits.get(chain.split, 0)
    return queries * chain.rows_of_query(recipe)


def _count_rows(
    run: RunDir, counts: dict[str, _StageCount], of_feedback: list[PairCount | AgreementCount]
) -> None:
    """Read each table once, for all that count its rows: where a stage has none of its own, the nearest later
    one has them."""
    feedback = run.table("feedback")
    reading: dict[str, tuple[Table, list[_StageCount | PairCount | AgreementCount]]] = {
        feedback.uri: (feedback, [*of_feedback])
    }
    for name, count in counts.items():
        if (table := table_of_stage(run, name)) is not None:
            reading.setdefault(table.uri, (table, []))[1].append(count)
    for table, counting in reading.values():
        wanted = {name for count in counting for name in count.columns}
        for row in table.rows([name for name in table.schema.names if name in wanted]):
            for counter in counting:
                counter.add(row)


class _StageCount:
    """Counts the rows of one stage.

    A row that failed before this stage, or was not rendered and has come to a later stage, only passed
    through and is not counted; one that failed after it left this stage well.
    """

    def __init__(self, stage: StageSpec) -> None:
        self.stage, self.tally, self.order = stage, stage.tally(), spec.names(stage.chain)
        common = ("verdict", "skipped", "seconds", "usage", "error", "error_stage")
        self.columns = (*self.tally.columns, *common)
        self.position = self.order.index(stage.name)
        self.render = self.order.index("render") if "render" in self.order else len(self.order)
        self.out = self.timed = 0
        self.seconds, self.usage = 0.0, Charges()
        self.dropped, self.skipped, self.errored = Counter[str](), Counter[str](), Counter[str]()

    def add(self, row: Row) -> None:
        order, position = self.order, self.position
        failed_at = order.index(row["error_stage"]) if row["error_stage"] in order else len(order)
        not_rendered = _why_not_rendered(row) if failed_at >= self.render else None
        if failed_at < position or (not_rendered and position > self.render):
            return
        spent = (row["seconds"] or {}).get(self.stage.name)
        if spent is not None:
            self.seconds, self.timed = self.seconds + spent, self.timed + 1
        self.usage.add_row(row, self.stage.name)
        if failed_at == position:
            self.errored[reason_of(row["error"])] += 1
            self.tally.add_failed(row)
        elif not_rendered and position == self.render:
            self.skipped[not_rendered] += 1
        elif (reason := self.tally.add(row)) is not None:
            self.dropped[reason] += 1
        else:
            self.out += 1

    def entry(self, entered: int) -> dict[str, Any]:
        return _entry(
            entered,
            self.out,
            dropped=by_reason(self.dropped),
            skipped=by_reason(self.skipped),
            errored=by_reason(self.errored),
            seconds=round(self.seconds, 3) if self.timed else None,
            seconds_per_row=round(self.seconds / self.timed, 4) if self.timed else None,
            **(self.usage.shown() if self.stage.runs_on == "chat" else {}),
            **self.tally.result(),
        )


def _why_not_rendered(row: Row) -> str | None:
    if row.get("verdict") not in (None, "aligned"):
        return f"not aligned: {row['verdict']}"
    return row.get("skipped")


def _pairing(run: RunDir, pairs: PairCount) -> dict[str, Any]:
    """Counts queries: one with a pair is out, one without is dropped, with the reason."""
    kinds: Counter[str] = Counter()
    paired: set[str] = set()
    for row in run.table("pairs").rows(["query_id", "kind"]):
        kinds[row["kind"]] += 1
        paired.add(row["query_id"])
    paired_with = run.read_json(PAIRED) if run.exists(PAIRED) else None
    more: dict[str, Any] = {"pairs": kinds.total(), "kinds": dict(sorted(kinds.items()))}
    if paired_with and "videos" in paired_with:
        more["videos"] = {
            strategy: {
                "videos": videos,
                "per_video_pair": round(videos / kinds["video"], 2) if kinds["video"] else None,
            }
            for strategy, videos in paired_with["videos"].items()
        }
    if not kinds and paired_with is None:
        waiting = {"not paired yet": len(pairs.queries)} if pairs.queries else {}
        return _entry(len(pairs.queries), 0, skipped=waiting, **more)
    why = by_reason(pairs.why_no_pair(paired))
    return _entry(len(pairs.queries), len(paired & pairs.queries), dropped=why, **more)


def _grouping(run: RunDir) -> dict[str, Any]:
    """Queries: one with a group is out. `left_out` counts the candidates that no group has, by reason."""
    groups = run.table("groups").count()
    found = run.read_json(GROUPED) if run.exists(GROUPED) else {"queries": {}, "candidates": {}}
    dropped = Counter(found["queries"])
    return _entry(
        groups + dropped.total(),
        groups,
        dropped=by_reason(dropped),
        groups=groups,
        left_out=found["candidates"],
    )


def _training(run: RunDir, phase: str, examples: int) -> dict[str, Any]:
    """Rows here are training examples; what the finished checkpoint says of them is what counts."""
    curve = run.metrics(phase)
    made = f"checkpoints/{phase}/vpo.json"
    before: Counter[str] = Counter()
    if phase == "sft" and run.exists(SFT_DROPPED):
        before.update(run.read_json(SFT_DROPPED))
    entered = examples + before.total()
    if not run.exists(made):
        why = "training has not ended" if curve else "not trained"
        waiting = {why: examples} if examples else {}
        return _entry(entered, 0, dropped=dict(before), skipped=waiting, steps=len(curve))
    facts = run.read_json(made)
    seconds = sum(line["seconds"] for line in curve)
    held_out = facts.get("held_out", 0)
    return _entry(
        entered,
        facts["rows"],
        dropped=dict(before + Counter(facts["dropped"])),
        skipped={"held out for evaluation": held_out} if held_out else {},
        steps=facts["steps"],
        seconds=round(seconds, 3),
        seconds_per_row=round(seconds / facts["rows"], 4) if facts["rows"] else None,
    )
