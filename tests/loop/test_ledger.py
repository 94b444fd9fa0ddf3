"""The ledger adds up, tells reasons, and names what is missing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.loop.ledger import alarms, build_ledger, funnel, reason_of, reconcile
from vpo_ray.recipe import Draft, Recipe, load, parse
from vpo_ray.records import failed
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.spending import endpoint_cost

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"


@pytest.fixture
def recipe() -> Recipe:
    return load(TINY, ["pair.margin=0.5", "sample.k=3"])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def sampled(query: str, k: int) -> dict[str, Any]:
    return {
        "candidate_id": f"{query}-{k}",
        "query_id": query,
        "query": f"text of {query}",
        "k": k,
        "seed": k,
        "prompt": f"prompt {query} {k}",
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "seconds": {"sample": 0.5},
    }


def judged(row: dict[str, Any], verdict: str = "aligned", **more: Any) -> dict[str, Any]:
    return {**row, "verdict": verdict, "seconds": {**row["seconds"], "judge": 0.25}, **more}


def rendered(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "video_key": row["candidate_id"], "seconds": {**row["seconds"], "render": 2.0}}


def scored(row: dict[str, Any], score: float) -> dict[str, Any]:
    return {**row, "score": score, "seconds": {**row["seconds"], "score": 1.0}}


def queries(run: RunDir, *names: str, split: str = "dpo") -> None:
    run.table("queries").append([{"query_id": n, "query": n, "split": split} for n in names])


def write(run: RunDir, table: str, *rows: dict[str, Any]) -> None:
    for row in rows:
        run.table(table).append([row])


def full_run(run: RunDir) -> None:
    """Four queries with K = 3; one fails at every stage, two end in a pair."""
    queries(run, "a", "b", "c", "d")
    queries(run, "held out", split="eval")
    run.table("dropped").append(
        [{"row_id": str(i), "reason": reason} for i, reason in enumerate(["empty", "duplicate", "empty"])]
    )
    rows = {name: [sampled(name, k) for k in range(3)] for name in "abcd"}
    rows["d"][0] = failed({**rows["d"][0], "prompt": None}, "sample", "the policy's answer is empty")
    write(run, "candidates", *(row for group in rows.values() for row in group))
    verdicts = {
        name: [row if row.get("error") else judged(row) for row in group] for name, group in rows.items()
    }
    verdicts["b"][0] = judged(rows["b"][0], "unsafe", refined_prompt="mild", refined_verdict="aligned")
    verdicts["b"][1] = judged(rows["b"][1], "imprecise", refined_prompt="no", refined_verdict="unsafe")
    verdicts["d"][1] = failed(rows["d"][1], "judge", "the judge's answer is not JSON (line 3): '{\"cri'")
    write(run, "verdicts", *(row for group in verdicts.values() for row in group))
    write(run, "renders", *(_render(row) for group in verdicts.values() for row in group))
    final = [_render(row) for group in verdicts.values() for row in group]
    scores = dict(zip([row["candidate_id"] for row in final], [3.0, 1.0, 1.2] + [1.0] * 9, strict=True))
    write(run, "feedback", *(_score(row, scores[row["candidate_id"]]) for row in final))
    pair = {"query": "q", "chosen": "x", "rejected": "y", "chosen_id": "1", "rejected_id": "2"}
    run.table("pairs").append([{**pair, "pair_id": "p", "query_id": "a", "kind": "video", "margin": 2.0}])
    run.table("pairs").append([{**pair, "pair_id": "q", "query_id": "b", "kind": "text"}])


def used(stage: str, cost: float) -> dict[str, Any]:
    return {"usage": {stage: {"prompt": 100, "completion": 10, "cost": cost}}}


def test_what_endpoints_took_is_counted_for_failed_rows_too(run: RunDir, recipe: Recipe) -> None:
    recipe = recipe.model_copy(update={"draft": Draft(examples="examples.jsonl")})
    queries(run, "a", "b")
    queries(run, "c", "d", "e", split="sft")
    assert (endpoint_cost(run), reconcile(build_ledger(run, recipe))[0]) == (
        0.0,
        "draft: 3 in, but 0 out + 0 dropped + 0 skipped + 0 errored: 3 not accounted for",
    )
    rows = [sampled(name, k) for name in "ab" for k in range(recipe.sample.k)]
    write(run, "candidates", *rows)
    done = [judged(row) | used("judge", 0.25) for row in rows[:-2]]
    done.append(judged(rows[-2], "unsafe", refined_prompt="x", refined_fault="equal to the original"))
    done.append(failed(rows[-1] | used("judge", 0.5), "judge", "Refusal: the model refused"))
    write(run, "verdicts", *done)
    trail = {"seed": 1, "seconds": {"draft": 2.0}}
    run.table("drafts").append(
        [
            {**trail, **used("draft", 1.0), "draft_id": "1", "query_id": "c", "query": "c", "target": "x"},
            {**trail, **used("draft", 1.0), "draft_id": "2", "query_id": "d", "query": "d",
             "verdict": "unsafe", "fault": "refined prompt still unsafe"},
            failed({**trail, "draft_id": "3", "query_id": "e", "query": "e"}, "draft", "Refusal: no"),
        ]
    )  # fmt: skip
    stages = build_ledger(run, recipe)["stages"]
    count = len(rows)
    assert stages["judge"]["cost"] == 0.25 * (count - 2) + 0.5
    assert stages["judge"]["tokens"] == {"prompt": 100 * (count - 1), "completion": 10 * (count - 1)}
    assert stages["judge"]["refined_faults"] == {"equal to the original": 1}
    assert stages["judge"]["errored"] == {"Refusal: the model refused": 1}
    drafted = stages["draft"]
    assert (drafted["in"], drafted["out"], drafted["cost"], drafted["seconds_per_row"]) == (3, 1, 2.0, 2.0)
    assert drafted["dropped"] == {"refined prompt still unsafe": 1}
    assert drafted["errored"] == {"Refusal: no": 1}
    assert endpoint_cost(run) == 2.0 + stages["judge"]["cost"]
    assert not [p for p in reconcile({"stages": stages}) if p.startswith(("draft", "judge"))]


def _render(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("error") or row["verdict"] != "aligned":
        return row
    if row["candidate_id"] == "c-0":
        return failed(row, "render", "CUDA out of memory. Tried to allocate 2.50 GiB at 0x7f00aa11")
    return rendered(row)


def _score(row: dict[str, Any], score: float) -> dict[str, Any]:
    if row.get("error") or row["verdict"] != "aligned":
        return row
    if row["candidate_id"] == "c-1":
        return failed(row, "score", "cannot decode /data/videos/ab/abc.mp4")
    return scored(row, score)


def test_every_stage_adds_up_and_tells_why(run: RunDir, recipe: Recipe) -> None:
    full_run(run)
    ledger = build_ledger(run, recipe)
    assert reconcile(ledger) == []
    stages = ledger["stages"]
    counts = {name: (entry["in"], entry["out"]) for name, entry in stages.items()}
    assert counts == {
        "curate": (8, 5),
        "sample": (12, 11),
        "judge": (11, 10),
        "render": (10, 7),
        "score": (7, 6),
        "pair": (4, 2),
        "sft": (0, 0),
        "dpo": (2, 0),
    }
    assert stages["curate"]["dropped"] == {"empty": 2, "duplicate": 1}
    assert stages["curate"]["splits"] == {"dpo": 4, "eval": 1}
    assert stages["sample"]["errored"] == {"the policy's answer is empty": 1}
    assert stages["sample"]["tokens"] == {"prompt": 1100, "completion": 110}
    assert stages["judge"]["verdicts"] == {"aligned": 8, "imprecise": 1, "unsafe": 1}
    assert (stages["judge"]["refined"], stages["judge"]["refined_aligned"]) == (2, 1)
    assert stages["render"]["skipped"] == {"not aligned: imprecise": 1, "not aligned: unsafe": 1}
    assert stages["render"]["errored"] == {"CUDA out of memory. Tried to allocate N GiB at ID": 1}
    assert (stages["render"]["seconds"], stages["render"]["seconds_per_row"]) == (14.0, 2.0)
    assert stages["score"]["errored"] == {"cannot decode PATH": 1}
    assert stages["pair"]["kinds"] == {"text": 1, "video": 1}
    assert stages["pair"]["dropped"] == {"one scored video only, no aligned refinement": 2}
    assert stages["dpo"]["skipped"] == {"not trained": 2}
    assert funnel(ledger) == {"queries": 4, "candidates": 11, "aligned": 8, "videos": 7, "pairs": 2}
    assert json.loads(json.dumps(ledger)) == ledger


def test_the_last_table_alone_gives_the_same_counts(run: RunDir, recipe: Recipe, tmp_path: Path) -> None:
    full_run(run)
    kept = RunDir(tmp_path / "kept")
    for name in ("queries", "dropped", "feedback", "pairs"):
        kept.table(name).append(list(run.table(name).rows()))
    assert build_ledger(kept, recipe) == build_ledger(run, recipe)


def test_rows_in_flight_are_named(run: RunDir, recipe: Recipe) -> None:
    queries(run, "a", "b")
    write(run, "candidates", *(sampled("a", k) for k in range(3)))
    write(run, "verdicts", judged(sampled("a", 0)), judged(sampled("a", 1)))
    told = reconcile(build_ledger(run, recipe))
    assert told == [
        "sample: 6 in, but 3 out + 0 dropped + 0 skipped + 0 errored: 3 not accounted for",
        "judge: 3 in, but 2 out + 0 dropped + 0 skipped + 0 errored: 1 not accounted for",
        "render: 2 in, but 0 out + 0 dropped + 0 skipped + 0 errored: 2 not accounted for",
    ]


def test_a_retried_error_counts_once(run: RunDir, recipe: Recipe) -> None:
    queries(run, "a")
    run.table("candidates").append(
        [sampled("a", 0), failed(sampled("a", 1), "sample", "boom"), sampled("a", 2)]
    )
    run.table("candidates").append([sampled("a", 1)])
    sample = build_ledger(run, recipe)["stages"]["sample"]
    assert (sample["in"], sample["out"], sample["errored"]) == (3, 3, {})


def test_prompts_that_the_video_model_cut_are_counted_and_explained(run: RunDir, recipe: Recipe) -> None:
    queries(run, "a")
    rows = [judged(sampled("a", k)) for k in range(3)]
    made = [rendered(row) | {"text_cut": cut} for row, cut in zip(rows, (0, 84, 3), strict=True)]
    write(run, "renders", *made)
    ledger = build_ledger(run, recipe)
    assert ledger["stages"]["render"]["text_cut"] == {"videos": 2, "of": 3, "most_tokens": 84}
    [alarm] = alarms(ledger)
    assert "2 of 3 rendered prompts (67%) were cut at the video model's text length, by up to 84" in alarm
    assert "render.max_text_tokens" in alarm


@pytest.mark.parametrize("cut", [None, 0])
def test_nothing_is_said_where_no_prompt_was_cut_or_videos_do_not_tell(
    run: RunDir, recipe: Recipe, cut: int | None
) -> None:
    queries(run, "a")
    write(run, "renders", rendered(judged(sampled("a", 0))) | {"text_cut": cut})
    ledger = build_ledger(run, recipe)
    assert (ledger["stages"]["render"]["text_cut"] is None) == (cut is None)
    assert alarms(ledger) == []


def test_training_counts_examples_steps_and_seconds(run: RunDir, recipe: Recipe) -> None:
    run.table("sft").append([{"query_id": str(i), "query": "q", "prompt": "p"} for i in range(8)])
    run.write_metrics("sft", [{"step": step, "loss": 1.0, "seconds": 0.5} for step in (1, 2, 3, 4)])
    assert build_ledger(run, recipe)["stages"]["sft"]["skipped"] == {"training has not ended": 8}
    run.write_json(
        "checkpoints/sft/vpo.json", {"rows": 7, "dropped": {"longer than 512 tokens": 1}, "steps": 4}
    )
    ledger = build_ledger(run, recipe)
    sft = ledger["stages"]["sft"]
    assert (sft["in"], sft["out"], sft["steps"], sft["seconds"]) == (8, 7, 4, 2.0)
    assert sft["dropped"] == {"longer than 512 tokens": 1}
    assert reconcile(ledger) == []


@pytest.mark.parametrize(
    ("scores", "prompts", "override", "reason"),
    [
        ([1.0, 1.4], "xy", "pair.choice=best", "all scores within the margin of 0.5"),
        ([1.0, 3.0], "xx", "pair.choice=best", "all scored prompts are the same"),
        (
            [1.0, 3.0],
            "xy",
            "pair.dominance=question",
            "no candidate both over the margin and dominant by question",
        ),
        ([1.0, 3.0], "xy", "pair.video_per_query=0", "video pairs are off (pair.video_per_query)"),
        ([], "", "pair.choice=best", "no aligned candidate, no aligned refinement"),
    ],
)
def test_a_query_without_a_pair_tells_why(
    run: RunDir, scores: list[float], prompts: str, override: str, reason: str
) -> None:
    recipe = load(TINY, ["pair.margin=0.5", override])
    rows = [judged(sampled("a", 9), "refusal")]
    for k, (score, prompt) in enumerate(zip(scores, prompts, strict=True)):
        rows.append(scored(rendered(judged({**sampled("a", k), "prompt": prompt})), score))
    write(run, "feedback", *rows)
    pair = build_ledger(run, recipe)["stages"]["pair"]
    assert (pair["in"], pair["skipped"]) == (1, {"not paired yet": 1})
    run.write_json("meta/pairs.json", {"reasons": {}})
    assert build_ledger(run, recipe)["stages"]["pair"]["dropped"] == {reason: 1}


def test_errors_of_one_kind_share_a_reason() -> None:
    one = reason_of("HTTP 503 from http://host:8000/v1 after 3 tries (id deadbeef0123)\nTraceback ...")
    two = reason_of("HTTP 503 from http://other:9/v1 after 5 tries (id 0123456789ab)")
    assert one == two == "HTTP N from PATH after N tries (id ID)"
    assert reason_of("") == "no message"
    assert len(reason_of("word " * 500)) == 120


def test_an_empty_run_directory_has_an_empty_ledger(run: RunDir, recipe: Recipe) -> None:
    ledger = build_ledger(run, recipe)
    assert reconcile(ledger) == []
    assert set(funnel(ledger).values()) == {0}


def test_a_hundred_thousand_rows_take_seconds(run: RunDir, recipe: Recipe) -> None:
    big = parse({**recipe.dump(), "sample": {**recipe.dump()["sample"], "k": 1}}, "test")
    names = [f"q{i}" for i in range(100_000)]
    queries(run, *names)
    run.table("candidates").append([sampled(name, 0) for name in names])
    start = time.process_time()
    stages = build_ledger(run, big)["stages"]
    assert (stages["sample"]["out"], stages["sample"]["tokens"]["completion"]) == (100_000, 1_000_000)
    assert time.process_time() - start < 30
