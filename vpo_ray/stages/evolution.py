"""Evolution: what becomes of a query's prompts from round to round. Pure functions.

The entries of a query are rows of EVOLUTION: the query itself, then what an LLM wrote in each round (see
`stages.evolve`), with what judge, video model and rewards made of it. From them follow the fitness, what the
LLM is shown next, when to stop, and the SFT target (Prompt-A-Video, `booster/finetuning/gpt_boost.py`; the
judge before the renderer, one seed, and the ends of a query are ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vpo_ray.recipe import Evolve, Formula
from vpo_ray.records import EVOLUTION, Row, content_id, seed_of
from vpo_ray.stages.formula import raw_values, weigh

UNSAFE = "the query is labelled unsafe"

# Why no further round of a query is asked for.
FAILED = "the query's own video failed"
UNANSWERED = "the LLM gave no answer"
ALL_ROUNDS = "all rounds"
BUDGET = "budget of videos"
PATIENCE = "no better prompt"

MISSING = "the LLM wrote fewer prompts than it was asked for"

# Why a query has no SFT target.
NONE_ALIGNED = "no aligned prompt"
NONE_SCORED = "no scored prompt"
NONE_INSIDE = "no prompt passes the gates"
NONE_PASSES = "no prompt passes the thresholds"
NONE_BETTER = "no prompt beats the query by the margin"

_FROM_RESULT = ("verdict", "critique", "video_key", "video_uri", "score", "skipped", "error",
                "error_stage")  # fmt: skip


class FitnessError(ValueError):
    """A dimension that the recipe names and no reward gives; the message says which there are."""


def dimension(values: Mapping[str, float], name: str) -> float:
    """A score by its name, or a dimension by its own name where one reward alone has it. `vlm.score` is the
    score of vlm, unless that has a dimension of this name.

    Raises:
        FitnessError: none or several have it.
    """
    for known in (name, name.removesuffix(".score")):
        if known in values:
            return values[known]
    ends = [value for known, value in values.items() if known.endswith(f".{name}")]
    if len(ends) != 1:
        why = "several rewards give" if ends else "no reward gives"
        raise FitnessError(f"{why} a dimension {name}; there are {', '.join(values)}")
    return ends[0]


def with_fitness(
    entries: Sequence[Row], formula: Formula, thresholds: Mapping[str, float] | None = None
) -> list[Row]:
    """Entries of one query with their fitness by a formula's weights that hold in the end, and the gate or
    threshold that `refused` them. Values are normalised among all of the entries that have a score.

    Args:
        thresholds: least raw values of a target, beside those of the formula's terms.

    Raises:
        FitnessError: a dimension is named that no reward gives.
    """
    raw = [values for entry in entries if (values := _raw(entry))]
    named = [{name: dimension(values, name) for name in formula.names()} for values in raw]
    weighed = weigh(named, formula)
    facts = zip(raw, weighed.totals.tolist(), weighed.out, weighed.refused, strict=True)
    found = []
    for entry in entries:
        if _raw(entry):
            values, total, out, refused = next(facts)
            below = _below(values, thresholds or {})
            fitness = total if out is None else None
            entry = {**entry, "fitness": fitness, "refused": out or refused or below}
        found.append(entry)
    return found


def _raw(entry: Row) -> dict[str, float]:
    return {part["name"]: part["score"] for part in entry["dimensions"] or []}


def _below(values: Mapping[str, float], thresholds: Mapping[str, float]) -> str | None:
    # All are looked up, so that one that is not there is told with the first video.
    found = [(name, dimension(values, name), least) for name, least in thresholds.items()]
    return next((f"{name} below {least:g}" for name, value, least in found if not value >= least), None)


def entries_of(query: Row, asks: Sequence[Row], results: Mapping[str, Row], settings: Evolve) -> list[Row]:
    """The entries of one query as they are now, in the order of their rounds.

    Args:
        query: its Query row.
        asks: its answered Offspring rows.
        results: Feedback rows by `prompt_id`.

    Raises:
        FitnessError: the settings name a dimension that no reward gives.
    """
    unsafe = {"verdict": "unsafe", "skipped": UNSAFE} if query["unsafe"] else {}
    entries = [_entry(query, 0, 0, query["query"], [], unsafe)]
    for ask in sorted(asks, key=lambda ask: ask["round"]):
        parents = [shown["prompt_id"] for shown in ask["shown"] or []]
        written = ask["written"] or [{"prompt": None, "skipped": None}]
        for one in written:
            known = {"skipped": one["skipped"]}
            if ask["error"] is not None:
                known = {"error": ask["error"], "error_stage": ask["error_stage"]}
            elif one["prompt"] is None:
                known = {
                    "error": MISSING,
                    "error_stage": "evolve",
                }
            entries.append(_entry(query, ask["round"], len(entries), one["prompt"], parents, known))
    entries = [_with_result(entry, results.get(entry["prompt_id"])) for entry in entries]
    return with_fitness(entries, settings.formula, settings.thresholds)


def _entry(query: Row, number: int, k: int, prompt: str | None, parents: Sequence[str], known: Row) -> Row:
    return {
        **dict.fromkeys(EVOLUTION.names),
        "prompt_id": content_id("evolution", query["query_id"], number, k, prompt),
        **{name: query[name] for name in ("query_id", "query", "unsafe")},
        "image": query.get("image"),
        "round": number,
        "k": k,
        "parent_ids": list(parents),
        "prompt": prompt,
        **known,
    }


def _with_result(entry: Row, result: Row | None) -> Row:
    if result is None:
        return entry
    entry = {**entry, **{name: result[name] for name in _FROM_RESULT}, "seed": result["video_seed"]}
    parts = [{"name": name, "score": score} for name, score in raw_values(result).items()]
    return {**entry, "dimensions": parts or None}


def waits(entry: Row) -> bool:
    """Whether judge, video model and rewards are still to see this prompt."""
    return all(entry[name] is None for name in ("score", "skipped", "error")) and entry["verdict"] in (
        None,
        "aligned",
    )


def candidate_row(entry: Row) -> Row:
    """The Feedback row that the judge gets for an entry. The query itself is not judged."""
    names = ("query_id", "query", "image", "unsafe", "k", "prompt")
    row = {"candidate_id": entry["prompt_id"], **{name: entry[name] for name in names}, "seed": 0}
    return row if entry["round"] else {**row, "verdict": "aligned"}


def ranked(entries: Sequence[Row]) -> list[Row]:
    """The prompts that were written and have a fitness, the best first; of equal ones the earlier."""
    scored = [entry for entry in entries if entry["round"] and entry["fitness"] is not None]
    return sorted(scored, key=lambda entry: (-entry["fitness"], entry["k"]))


def why_ended(entries: Sequence[Row], settings: Evolve) -> str | None:
    """Why no further round of a query is asked for, or None. Its entries are complete."""
    own, last = entries[0], entries[-1]["round"]
    if own["error"] is not None:
        return FAILED
    if any(entry["prompt"] is None and _failed_whole(entry, entries) for entry in entries[1:]):
        return UNANSWERED
    if last >= settings.rounds:
        return ALL_ROUNDS
    if _videos_left(entries, settings) == 0:
        return BUDGET
    steady = settings.formula.last_round
    if settings.patience is not None and _rounds_without_gain(entries, steady) >= settings.patience:
        return PATIENCE
    return None


def _failed_whole(entry: Row, entries: Sequence[Row]) -> bool:
    """Whether nothing at all came of the entry's round."""
    return all(other["prompt"] is None for other in entries if other["round"] == entry["round"])


def videos_of(entries: Sequence[Row]) -> int:
    """Videos that were asked for, whether they were made, found in the store, or failed."""
    stages = ("render", "score")
    return sum(entry["video_key"] is not None or entry["error_stage"] in stages for entry in entries)


def _videos_left(entries: Sequence[Row], settings: Evolve) -> int:
    left = settings.prompts
    return left if settings.budget is None else max(0, min(left, settings.budget - videos_of(entries)))


def _rounds_without_gain(entries: Sequence[Row], steady: int) -> int:
    """Rounds at the end without a better prompt, of those from `steady` on: the rounds before it have other
    weights, and lead to the last ones."""
    best, since = float("-inf"), 0
    for number in range(entries[-1]["round"] + 1):
        found = [e["fitness"] for e in entries if e["round"] == number and e["fitness"] is not None]
        since = 0 if number < steady or max(found, default=best) > best else since + 1
        best = max([best, *found])
    return since


def next_ask(entries: Sequence[Row], settings: Evolve, model: str, seed: int) -> Row:
    """The Offspring row of a query's next round, before anything is written. The LLM is shown what is best
    by the weights of that round.

    Args:
        model: the name of the LLM.
        seed: the recipe's seed.
    """
    number = entries[-1]["round"] + 1
    entries = with_fitness(entries, settings.formula.at(number))
    own = entries[0]
    shown = [*([own] if own["fitness"] is not None else []), *ranked(entries)[: settings.top]]
    identity = content_id("ask", own["query_id"], number)
    return {
        "ask_id": identity,
        **{name: own[name] for name in ("query_id", "query", "image", "unsafe")},
        "round": number,
        "wanted": _videos_left(entries, settings),
        "seed": seed_of("evolve", seed, identity),
        "model": model,
        "shown": [{n: entry[n] for n in ("prompt_id", "prompt", "fitness", "dimensions")} for entry in shown],
        "known": list(dict.fromkeys(entry["prompt"] for entry in entries if entry["prompt"] is not None)),
    }


def target_of(entries: Sequence[Row], settings: Evolve) -> tuple[Row | None, str | None]:
    """The prompt that SFT learns for a query, or why there is none.

    It is the fittest of the prompts that were judged aligned, reach every threshold, and are fitter than the
    query itself by the margin at least. A query is no rival where it is not rendered, as it is labelled
    unsafe, or a gate leaves it out.
    """
    own, found = entries[0], ranked(entries)
    if own["error"] is not None:
        return None, FAILED
    if not found:
        if any(entry["round"] and entry["dimensions"] for entry in entries):
            return None, NONE_INSIDE
        aligned = any(entry["round"] and entry["verdict"] == "aligned" for entry in entries)
        return None, NONE_SCORED if aligned else NONE_ALIGNED
    passing = [entry for entry in found if _passes(entry, settings.thresholds)]
    if not passing:
        return None, NONE_PASSES
    best = passing[0]
    if own["fitness"] is not None:
        gain = best["fitness"] - own["fitness"]
        if gain <= 0 or gain < settings.margin:
            return None, NONE_BETTER
    return best, None


def _passes(entry: Row, thresholds: Mapping[str, float]) -> bool:
    return entry["refused"] is None and _below(_raw(entry), thresholds) is None


def finished(entries: Sequence[Row], settings: Evolve) -> list[Row]:
    """The entries with the SFT target marked; that of the query says why the evolution ended, and the fault
    where there is no target."""
    best, fault = target_of(entries, settings)
    ended = None if any(map(waits, entries)) else why_ended(entries, settings)
    chosen = None if best is None else best["prompt_id"]
    rows = [{**entry, "target": entry["prompt_id"] == chosen} for entry in entries]
    rows[0] |= {"ended": ended, "fault": fault}
    return rows
