"""Evolution: what becomes of a query's prompts from round to round. Pure functions.

The entries of a query are rows of EVOLUTION: the query itself, then what an LLM wrote in each round (see
`stages.evolve`), with what judge, video model and rewards made of it. From them follow the fitness, what the
LLM is shown next, when to stop, and the SFT target (Prompt-A-Video, `booster/finetuning/gpt_boost.py`; the
judge before the renderer, one seed, and the ends of a query are ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vpo_ray.recipe import Evolve
from vpo_ray.records import EVOLUTION, Row, content_id, seed_of
from vpo_ray.stages.formula import raw_values

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
NONE_PASSES = "no prompt passes the thresholds"
NONE_BETTER = "no prompt beats the query by the margin"

_FROM_RESULT = ("verdict", "critique", "video_key", "video_uri", "score", "skipped", "error",
                "error_stage")  # fmt: skip


class FitnessError(ValueError):
    """A dimension that the recipe names and no reward gives; the message says which there are."""


def dimension(values: Mapping[str, float], name: str) -> float:
    """A score by its name, or a dimension by its own name where one reward alone has it.

    Raises:
        FitnessError: none or several have it.
    """
    if name in values:
        return values[name]
    ends = [value for known, value in values.items() if known.endswith(f".{name}")]
    if len(ends) != 1:
        why = "several rewards give" if ends else "no reward gives"
        raise FitnessError(f"{why} a dimension {name}; there are {', '.join(values)}")
    return ends[0]


def fitness_of(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum of raw scores; without weights the score of `reward`."""
    if not weights:
        return values["reward"]
    return sum(weight * dimension(values, name) for name, weight in weights.items())


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
    return [_with_result(entry, results.get(entry["prompt_id"]), settings) for entry in entries]


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


def _with_result(entry: Row, result: Row | None, settings: Evolve) -> Row:
    if result is None:
        return entry
    entry = {**entry, **{name: result[name] for name in _FROM_RESULT}, "seed": result["video_seed"]}
    if result["score"] is None:
        return entry
    values = raw_values(result)
    for name in settings.thresholds:
        dimension(values, name)  # one that is not there is told with the first video
    return {
        **entry,
        "dimensions": [{"name": name, "score": score} for name, score in values.items()],
        "fitness": fitness_of(values, settings.fitness),
    }


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
    """The scored prompts that were written, the best first; of equal ones the earlier."""
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
    if settings.patience is not None and _rounds_without_gain(entries) >= settings.patience:
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


def _rounds_without_gain(entries: Sequence[Row]) -> int:
    best, since = float("-inf"), 0
    for number in range(entries[-1]["round"] + 1):
        found = [e["fitness"] for e in entries if e["round"] == number and e["fitness"] is not None]
        since = 0 if number == 0 or max(found, default=best) > best else since + 1
        best = max([best, *found])
    return since


def next_ask(entries: Sequence[Row], settings: Evolve, model: str, seed: int) -> Row:
    """The Offspring row of a query's next round, before anything is written.

    Args:
        model: the name of the LLM.
        seed: the recipe's seed.
    """
    own, number = entries[0], entries[-1]["round"] + 1
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
    query itself by the margin at least. A query that is not rendered, as it is labelled unsafe, is no rival.
    """
    own, found = entries[0], ranked(entries)
    if own["error"] is not None:
        return None, FAILED
    if not found:
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
    values = {part["name"]: part["score"] for part in entry["dimensions"]}
    return all(dimension(values, name) >= least for name, least in thresholds.items())


def finished(entries: Sequence[Row], settings: Evolve) -> list[Row]:
    """The entries with the SFT target marked; that of the query says why the evolution ended, and the fault
    where there is no target."""
    best, fault = target_of(entries, settings)
    ended = None if any(map(waits, entries)) else why_ended(entries, settings)
    chosen = None if best is None else best["prompt_id"]
    rows = [{**entry, "target": entry["prompt_id"] == chosen} for entry in entries]
    rows[0] |= {"ended": ended, "fault": fault}
    return rows
