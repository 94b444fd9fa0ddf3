"""SFT data as users have it: all prompts of a query are learnt, and what comes again is counted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vpo_ray import cli
from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.files.image_files import image_hash
from vpo_ray.loop import opening, phases, policies
from vpo_ray.loop.export import export
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.recipe import Draft, Judge, Recipe, RecipeError, load
from vpo_ray.records import query_id
from vpo_ray.stages.draft import Drafter
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.sft_data import CHAT_FILE, distinct, draft_rows, sft_rows, write_chat
from vpo_ray.train.examples import tokenise

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
DOUBLED = [
    ("a cat", "A grey cat sleeps on a sofa."),
    ("a cat", "A cat walks through tall grass."),
    ("a dog", "A dog runs."),
    ("a cat", "A grey cat sleeps on a sofa."),
    (" a cat ", "A grey cat sleeps on a sofa.\r\n"),  # the same once it is normalised
]


def written(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"query": q, "prompt": p}) + "\n" for q, p in rows), "utf-8")
    return path


def recipe_of(folder: Path, rows: list[tuple[str, str]], *more: str) -> Recipe:
    data = written(folder / "sft.jsonl", rows)
    return load(TINY, [f"out={folder / 'run'}", f"sft.data={data}", *more])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What training is asked for, in place of it."""
    calls: list[dict[str, Any]] = []

    def trained(_recipe: Any, _run: Any, _phase: str, start: Any, rows: list[Any], identity: str) -> str:
        calls.append({"rows": rows, "id": identity})
        return start.policy

    monkeypatch.setattr(phases, "_train", trained)
    return calls


def test_every_prompt_of_a_query_is_kept_and_what_comes_again_is_counted(
    tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    recipe = recipe_of(tmp_path, DOUBLED)
    run = opening.open_run(recipe)
    for _ in range(2):
        phases.train_sft(recipe, run)
    kept = {(row["query"], row["prompt"]) for row in run.table("sft").rows()}
    assert kept == set(DOUBLED[:3])
    assert [len(call["rows"]) for call in trained] == [3, 3]
    assert run.table("sft").count() == 3
    stage = build_ledger(run, recipe)["stages"]["sft"]
    assert (stage["in"], stage["dropped"], stage["skipped"]) == (5, {"duplicate": 2}, {"not trained": 3})
    run.write_json("checkpoints/sft/vpo.json", {"rows": 2, "dropped": {"duplicate": 1}, "steps": 1})
    stage = build_ledger(run, recipe)["stages"]["sft"]
    assert (stage["in"], stage["out"], stage["dropped"]) == (5, 2, {"duplicate": 3})
    assert reconcile({"stages": {"sft": stage}}) == []


def test_compaction_and_export_keep_every_prompt(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, DOUBLED)
    run = RunDir(recipe.out)
    rows, _ = distinct(sft_rows(str(tmp_path / "sft.jsonl")))
    for row in rows * 2:
        run.table("sft").append([row])
    run.table("sft").compact(fewest=2)
    assert run.table("sft").count() == len(list(run.table("sft").rows())) == 3
    assert export(recipe, run, "openai", str(tmp_path / "to")) == {"sft.jsonl": 3}


def test_every_prompt_of_a_query_becomes_an_example(tiny_models: Path, tmp_path: Path) -> None:
    task = "Rewrite: {query}"
    tokenizer = load_tokenizer(str(tiny_models / "policy"), task)
    rows = list(sft_rows(str(written(tmp_path / "sft.jsonl", DOUBLED))))
    examples, dropped = tokenise("sft", rows, tokenizer, task, 1024)
    assert (len(examples), dropped) == (3, {"duplicate": 2})
    assert [e.id for e in tokenise("sft", rows[::-1], tokenizer, task, 1024)[0]] == [e.id for e in examples]


@pytest.mark.parametrize(
    ("rows", "known"),
    [
        (DOUBLED[1:3], "50f3136450edec48"),
        (DOUBLED[1:3] + DOUBLED[1:2], "7f248c346124acc5"),
        (DOUBLED[:3], None),
    ],
)
def test_the_policy_is_another_only_where_a_query_has_two_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, str]], known: str | None
) -> None:
    """The ids are those of earlier versions, which learnt one prompt of a query."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "sft.jsonl", rows)
    recipe = load(TINY, ["out=run", "sft.data=sft.jsonl", "policy.model=some/model"])
    found = policies.policy_id(recipe, RunDir(recipe.out))
    assert found == known if known is not None else found != "8b3d51117cd48cd3"


def test_a_run_whose_candidates_are_of_another_policy_is_refused(
    tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    recipe = recipe_of(tmp_path, DOUBLED)
    run = opening.open_run(recipe)
    query = {"query_id": "q", "query": "q", "unsafe": None}
    run.table("candidates").append(list(candidates(query, recipe.sample, "of before", recipe.seed)))
    with pytest.raises(policies.LoopError, match="sampled from another policy than this recipe's"):
        phases.train_sft(recipe, run)
    assert trained == [], "before an hour of training"
    identity = policies.policy_id(recipe, run)
    run.table("candidates").replace(candidates(query, recipe.sample, identity, recipe.seed))
    phases.train_sft(recipe, run)


@pytest.mark.parametrize("images", ["show", "ignore"])
def test_what_was_drafted_for_an_image_is_learnt_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str
) -> None:
    from vpo_ray import train

    asked: list[Any] = []
    monkeypatch.setattr(
        train, "train", lambda spec, rows: asked.append((spec, rows)) or SimpleNamespace(out="")
    )
    draft = {"draft": {"examples": str(written(tmp_path / "shots.jsonl", DOUBLED))}, "sft.data": None}
    options = {"size": {"longest_edge": 512}}
    more = {"queries.image_column": "image", "policy.images": images,
            "sample.engine.engine_kwargs": {"mm_processor_kwargs": options}}  # fmt: skip
    given = {"out": str(tmp_path / "run"), **draft, **more}
    recipe = load(TINY, [f"{key}={json.dumps(value)}" for key, value in given.items()])
    run = opening.open_run(recipe)
    for name in ("a.png", "b.png", None):
        row = {"query_id": f"q {name}", "query": "a cat", "image": name, "unsafe": None, "seed": 1}
        run.table("drafts").append([{**row, "draft_id": f"{name}", "target": "A cat.", "prompt": "A cat."}])
    phases.train_sft(recipe, run)
    [(spec, rows)] = asked
    assert sorted(str(row["image"]) for row in rows) == ["None", "a.png", "b.png"]
    assert spec.images == (run.at("images") if images == "show" else None)
    assert spec.image_arguments == options
    assert write_chat(run, draft_rows(run)) == 3
    named = {row["image"] for row in sft_rows(run.at(CHAT_FILE), image="image")}
    assert named == {"images/a.png", "images/b.png", None}
    other = run.table("drafts").rows()
    known = policies.policy_id(recipe, run)
    run.table("drafts").replace([{**row, "image": "b.png"} for row in other])
    assert (policies.policy_id(recipe, run) == known) is (images == "ignore")


def test_a_file_gives_prompts_for_queries_with_an_image(
    tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "red.png")
    rows = [{"query": "a cat", "prompt": "A cat.", "image": image} for image in ("red.png", "", "no.png")]
    path = tmp_path / "seen.jsonl"
    path.write_text("\n".join(map(json.dumps, rows[:2])), "utf-8")
    given = [f"out={tmp_path / 'run'}", f"sft.data={path}", "sft.image_column=image"]
    recipe = load(TINY, [*given, "queries.image_column=image"])
    run = opening.open_run(recipe)
    phases.train_sft(recipe, run)
    name = images_of(run).put((tmp_path / "red.png").read_bytes())
    learnt = {(row["query_id"], row["image"]) for row in run.table("sft").rows()}
    assert learnt == {(query_id("a cat"), None), (query_id("a cat", image_hash(name)), name)}
    assert [row["image"] for row in trained[0]["rows"]].count(name) == 1

    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(policies.LoopError, match=r"row 3: no such image: .*no\.png"):
        phases.train_sft(recipe, run)
    with pytest.raises(RecipeError, match=r"sft.image_column has no effect without queries.image_column"):
        load(TINY, given)


def test_a_table_of_an_earlier_version_is_read_and_filled_up(
    tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    recipe = recipe_of(tmp_path, DOUBLED)
    run = opening.open_run(recipe)
    old = {"query_id": query_id("a cat"), "query": "a cat", "prompt": DOUBLED[1][1]}
    run.table("sft").append([old])
    assert cli.main(["report", TINY, "--out", run.uri, "--set", f"sft.data={tmp_path / 'sft.jsonl'}"]) == 0
    phases.train_sft(recipe, run)
    assert run.table("sft").count() == 3


@pytest.mark.parametrize("copies", [0, 1, 4])
def test_a_draft_is_shown_as_many_examples_as_asked_for(copies: int) -> None:
    """However many of them are answers to its own query, which it is never shown."""
    texts = ["a cat"] * copies + [f"a dog, number {n}" for n in range(6)]
    examples = [{"query_id": query_id(t), "query": t, "prompt": f"{t} {n}"} for n, t in enumerate(texts)]
    drafter = Drafter(Draft(examples="x", shots=3), Judge(model="m"), examples)
    for seed in range(20):
        shown = drafter.few_shot.shown({"seed": seed, "query_id": query_id("a cat")})
        assert len(shown) == 3
        assert all(example["query"] != "a cat" for example in shown)
