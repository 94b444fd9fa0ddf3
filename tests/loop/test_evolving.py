"""The driver of an evolution between its batches: what is due follows from the tables, which the test fills
as the stages would."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vpo_ray.loop.evolution import Evolving, evolve_prompts
from vpo_ray.loop.ledger import build_ledger, funnel, reconcile
from vpo_ray.loop.opening import OtherRecipeError, open_run
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.loop.policies import LoopError, policy_id, training_rows
from vpo_ray.loop.refine import of_query
from vpo_ray.plan import plan
from vpo_ray.recipe import Recipe, RecipeError, load, parse, sources
from vpo_ray.records import Row, failed, query_id, seed_of
from vpo_ray.stages.evolution import NONE_BETTER, PATIENCE
from vpo_ray.storage.run_dir import EVOLUTION_ASKED, EVOLUTION_SCORED, RunDir
from vpo_ray.storage.sft_data import evolved_rows, write_chat

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
QUERIES = ("a cat", "a dog", "the sea")
EVOLVE = "evolve={prompts: 2, rounds: 4, patience: 2, pairs: true}"


def recipe_at(folder: Path, *more: str) -> Recipe:
    models = [f"{key}.model=some/model" for key in ("policy", "judge", "render", "reward")]
    return load(TINY, [*models, f"out={folder / 'run'}", "sft.data=evolved", EVOLVE, *more])


def run_with_queries(recipe: Recipe) -> RunDir:
    run = open_run(recipe)
    rows = [{"query_id": query_id(q), "query": q, "source": "t", "split": "sft"} for q in QUERIES]
    run.table("queries").append([*rows, {**rows[0], "query_id": query_id("other"), "split": "dpo"}])
    return run


def score_of(prompt: str) -> float:
    """What the reward outside would say: the sea never gets better than by itself."""
    return 9.0 if prompt == "the sea" else seed_of("score", prompt) % 1000 / 1000


def written(ask: Row) -> Row:
    """As the stage `evolve` would leave it: the second prompt of the first round repeats the first."""
    prompts = [f"{ask['query']}, take {ask['round']}.{k}" for k in range(ask["wanted"])]
    found = [{"prompt": prompt, "skipped": None} for prompt in prompts]
    if ask["round"] == 1 and len(found) > 1:
        found[1] = {"prompt": prompts[0], "skipped": "duplicate"}
    return {**ask, "written": found}


def scored(row: Row) -> Row:
    """As the stages from the judge on would leave it."""
    if "take 2.1" in row["prompt"]:
        return {**row, "verdict": "unsafe"}
    score = score_of(row["prompt"])
    made = {"video_key": row["prompt"], "video_seed": seed_of("video", row["query_id"]), "score": score}
    return {**row, "verdict": "aligned", "dimensions": [{"name": "light", "score": score / 2}], **made}


def steps(run: RunDir, evolving: Evolving) -> Iterator[int]:
    """Fill the tables batch by batch; yields after every row, where a kill may come."""
    asked, done = RunDir(run.at(EVOLUTION_ASKED)), RunDir(run.at(EVOLUTION_SCORED))
    while (due := evolving.due(retry_errors=False)).asks or due.prompts:
        for ask in due.asks:
            asked.table("offspring").append([written(ask)])
            yield len(due.asks)
        for row in due.prompts:
            done.table("feedback").append([scored(row)])
            yield len(due.prompts)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipe_at(tmp_path)


@pytest.fixture
def run(recipe: Recipe) -> RunDir:
    made = run_with_queries(recipe)
    for _ in steps(made, Evolving(recipe, made)):
        pass
    return made


def finish(recipe: Recipe, run: RunDir) -> list[Row]:
    evolving = Evolving(recipe, run)
    assert evolving.is_done()
    rows = list(evolving.rows())
    run.table("evolutions").replace(rows)
    return rows


def test_queries_evolve_until_they_get_no_better(recipe: Recipe, run: RunDir) -> None:
    rows = finish(recipe, run)
    by_query = {q: [row for row in rows if row["query"] == q] for q in QUERIES}
    sea = by_query["the sea"]
    assert (sea[0]["ended"], sea[0]["fault"]) == (PATIENCE, NONE_BETTER)
    assert max(row["round"] for row in sea) == 2, "nothing beats the query, twice"
    assert not any(row["target"] for row in sea)
    for name in ("a cat", "a dog"):
        target = [row for row in by_query[name] if row["target"]]
        best = max((row for row in by_query[name] if row["fitness"] is not None), key=lambda r: r["fitness"])
        assert target == ([best] if best["round"] else [])
        assert len({row["seed"] for row in by_query[name] if row["video_key"]}) == 1
    assert all(row["fitness"] is None for row in rows if row["skipped"] or row["verdict"] == "unsafe")
    assert len({row["prompt_id"] for row in rows}) == len(rows)


def test_a_run_that_is_killed_anywhere_ends_with_the_same_table(tmp_path: Path, run: RunDir) -> None:
    recipe = recipe_at(tmp_path)
    whole = list(Evolving(recipe, run).rows())
    for stop in (0, 4, 7, 13, 20):
        other = recipe_at(tmp_path / f"stopped {stop}")
        killed = run_with_queries(other)
        for number, _ in enumerate(steps(killed, Evolving(other, killed))):
            if number == stop:
                break
        else:
            pytest.fail("nothing was stopped")
        for _ in steps(killed, Evolving(other, killed)):  # another driver
            pass
        assert list(Evolving(other, killed).rows()) == whole, f"killed after row {stop}"


def test_what_failed_is_taken_again_and_ends_its_query_meanwhile(recipe: Recipe) -> None:
    run = run_with_queries(recipe)
    asked, done = RunDir(run.at(EVOLUTION_ASKED)), RunDir(run.at(EVOLUTION_SCORED))
    evolving = Evolving(recipe, run)
    done.table("feedback").append([scored(row) for row in evolving.due(False).prompts])
    cat, *others = evolving.due(False).asks
    asked.table("offspring").append([failed(cat, "evolve", "ChatError: down"), *map(written, others)])
    ended = evolving.due(False)
    assert (len(ended.prompts), ended.ended.total()) == (2, 1)
    again = evolving.due(retry_errors=True)
    assert [ask["ask_id"] for ask in again.asks] == [cat["ask_id"]]
    asked.table("offspring").append([written(cat)])
    assert [e for e in evolving.due(False).prompts if e["query_id"] == cat["query_id"]]
    broken = evolving.due(False).prompts
    done.table("feedback").append(
        [failed({**row, "verdict": "aligned"}, "render", "no memory") for row in broken]
    )
    assert not evolving.due(False).prompts
    assert {row["candidate_id"] for row in evolving.due(True).prompts} == {
        row["candidate_id"] for row in broken
    }


def test_a_budget_counts_videos(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path, "evolve.budget=3", "evolve.patience=null")
    run = run_with_queries(recipe)
    for _ in steps(run, Evolving(recipe, run)):
        pass
    rows = finish(recipe, run)
    videos = Counter(row["query"] for row in rows if row["video_key"] is not None)
    assert set(videos.values()) == {3}
    assert {row["ended"] for row in rows if row["round"] == 0} == {"budget of videos"}


# What comes of it


def test_targets_are_learnt(recipe: Recipe, run: RunDir) -> None:
    with pytest.raises(LoopError, match="run `vpo evolve` first"):
        training_rows(recipe, run)
    rows = finish(recipe, run)
    targets = {(row["query"], row["prompt"]) for row in rows if row["target"]}
    assert {(row["query"], row["prompt"]) for row in training_rows(recipe, run)} == targets
    assert write_chat(run, evolved_rows(run)) == len(targets) > 0
    before = policy_id(recipe, run)
    run.table("evolutions").replace(row for row in rows if row["query"] != "a cat")
    assert policy_id(recipe, run) != before


def test_pairs_come_from_the_same_videos(tmp_path: Path, recipe: Recipe, run: RunDir) -> None:
    finish(recipe, run)
    assert make_pairs(recipe, run) > 0
    for pair in run.table("pairs").rows():
        assert pair["kind"] == "video"
        assert score_of(pair["chosen"]) > score_of(pair["rejected"]) + recipe.pair.margin
        assert pair["query"] not in (pair["chosen"], pair["rejected"])
    with pytest.raises(LoopError, match="no preference pairs"):
        make_pairs(recipe_at(tmp_path, "evolve.pairs=false"), run)


def test_the_ledger_counts_queries_prompts_and_videos(recipe: Recipe, run: RunDir) -> None:
    before = build_ledger(run, recipe)["stages"]["evolve"]
    assert (before["in"], before["skipped"]) == (3, {"not evolved yet": 3})
    rows = finish(recipe, run)
    ledger = build_ledger(run, recipe)
    assert not [line for line in reconcile(ledger) if line.startswith("evolve")]
    found = ledger["stages"]["evolve"]
    own = {row["query"]: row["fitness"] for row in rows if row["round"] == 0}
    gains = [row["fitness"] - own[row["query"]] for row in rows if row["target"]]
    assert (found["in"], found["out"]) == (3, len(gains))
    assert found["gain"] == pytest.approx(sum(gains) / len(gains), abs=1e-4)
    assert found["dropped"][NONE_BETTER] == 3 - len(gains)
    assert found["videos"] == sum(row["video_key"] is not None for row in rows)
    assert found["not_rendered"] == {"duplicate": 3}
    assert found["verdicts"]["unsafe"] == 3
    assert found["prompts"] == sum(row["round"] > 0 for row in rows)
    assert list(funnel(ledger).items())[:2] == [("evolved", found["prompts"]), ("targets", len(gains))]


def test_a_threshold_that_nothing_passes_is_one_message(tmp_path: Path, run: RunDir) -> None:
    recipe = recipe_at(tmp_path, "evolve.thresholds={light: 5}", "evolve.pairs=false")
    with pytest.raises(LoopError, match=r"no evolved prompt is fit(.*\n)+.*3 no prompt passes the th"):
        evolve_prompts(recipe, run)


def test_a_dimension_that_no_reward_gives_is_one_message(tmp_path: Path, run: RunDir) -> None:
    for key in ("fitness", "thresholds"):
        recipe = recipe_at(tmp_path, f"evolve.{key}={{sound: 1}}")
        with pytest.raises(LoopError, match=r"no reward gives a dimension sound; there are reward, re"):
            evolve_prompts(recipe, run)


def test_what_cannot_evolve_says_so(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path)
    with pytest.raises(LoopError, match="no query is in the sft split"):
        evolve_prompts(recipe, open_run(recipe))
    with pytest.raises(LoopError, match="no evolve section"):
        evolve_prompts(recipe.model_copy(update={"evolve": None}), RunDir(recipe.out))


# The recipe and its plan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("evolve=null", "sft.data: evolved needs an evolve section"),
        ("evolve.preset=vpo", "preset 'vpo' is not known; there are prompt_a_video"),
        ("evolve.budget=1", "evolve.budget"),
        ("evolve.near_duplicates={drop: false}", "drop has no effect"),
        ("evolve.fitness=formula", "formula needs a section `formula`"),
        ("evolve.fitness={reward: [1, 0]}", "nothing has a weight in round 2"),
        ("evolve.fitness={terms: {reward: {abov: 1}}}", "evolve.fitness.terms.reward.abov: unknown key; did"),
        ("evolve.fitness={gates: {reward: {above: 1}}}", "evolve.fitness.terms: missing"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(tmp_path: Path, change: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe_at(tmp_path, change)


def test_what_learns_from_no_pairs_draws_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pairs has no effect with rl"):
        recipe_at(tmp_path, "dpo=null", "pair={}", "rl={epochs: 1, lr: 1.0e-6, global_batch: 8}")


def test_evolution_leaves_other_recipes_as_they_are(tmp_path: Path) -> None:
    plain = load(TINY)
    assert "evolve" not in str(plain.model_dump(exclude_defaults=True))
    assert recipe_at(tmp_path).fingerprint("sft") != plain.fingerprint("sft")
    assert recipe_at(tmp_path, "evolve.top=2").fingerprint() != recipe_at(tmp_path).fingerprint()
    assert dict(sources(recipe_at(tmp_path)))["evolve.prompt"] == "builtin:evolve"
    assert "sft.data" not in dict(sources(recipe_at(tmp_path))), "a word, and no file"
    labelled = recipe_at(tmp_path, "evolve.fitness={labels: 2}").fingerprint()
    assert labelled != recipe_at(tmp_path, "evolve.fitness={labels: 3}").fingerprint(), "a dimension's name"


def test_the_fitness_may_be_the_formula_of_the_recipe(tmp_path: Path) -> None:
    formula = "formula={terms: {reward: 1, reward.light: 2}, normalise: zscore}"
    taken = recipe_at(tmp_path, formula, "evolve.fitness=formula")
    assert taken.evolve is not None
    assert taken.evolve.formula == taken.formula
    assert parse(taken.dump(), "a stored one") == taken
    run = open_run(taken)
    other = "formula={terms: {reward: 2}}"
    with pytest.raises(OtherRecipeError, match=r"evolve\.fitness\.normalise: 'zscore' -> 'none'"):
        open_run(recipe_at(tmp_path, other, "evolve.fitness=formula", f"out={run.uri}"))
    kind = "{kind: vbench, dimensions: [temporal_flickering]}"
    more = f"more_rewards={{aesthetic: {kind}, mps: {kind}}}"
    own = recipe_at(tmp_path / "other", "pair={preset: prompt_a_video}", more, "evolve.fitness=formula")
    assert own.evolve is not None
    assert own.evolve.formula.terms["mps"].above == 8.5


def test_a_dimension_that_a_formula_names_and_no_reward_gives_is_one_message(
    tmp_path: Path, run: RunDir
) -> None:
    gates = "evolve.fitness={terms: {reward: 1}, gates: {sound: {above: 1}}}"
    with pytest.raises(LoopError, match=r"evolve\.fitness.*no reward gives a dimension sound; there are r"):
        evolve_prompts(recipe_at(tmp_path, gates), run)


def test_a_gate_that_nothing_passes_is_one_message(tmp_path: Path, run: RunDir) -> None:
    gates = "evolve.fitness={terms: {reward: 1}, gates: {light: {above: 9}}}"
    with pytest.raises(LoopError, match=r"no evolved prompt is fit(.*\n)+.*3 no prompt passes the gates"):
        evolve_prompts(recipe_at(tmp_path, gates, "evolve.pairs=false", "evolve.patience=1"), run)


def test_a_plan_counts_the_videos_of_evolution(tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_text(
        "\n".join(f"a cat, number {number}" for number in range(40)), "utf-8"
    )
    sets = [f"queries.path={tmp_path}/queries.txt", "queries.splits={sft: 0.5, dpo: 0.5}", "evolve.budget=5",
            "reward={kind: vbench, dimensions: [temporal_flickering]}", "pair.dominance=none"]  # fmt: skip
    made = plan(recipe_at(tmp_path, *sets))
    queries, own = made.queries["sft"], made.queries["dpo"]
    stages = {stage.name: stage for stage in made.phases}
    assert stages["evolve"].rows == queries * 4
    assert stages["sample"].rows == own * 4
    assert stages["judge"].rows == own * 4 + queries * 4 * 2
    assert (stages["render"].rows, stages["render"].expected) == (own * 4 + queries * 5, False)
    assert (stages["sft"].rows, stages["sft"].expected) == (queries, False)
    assert any("at most 5 videos each" in note for note in made.notes)
    idle = plan(recipe_at(tmp_path, *sets, "sft=null", "evolve.pairs=false"))
    assert "evolve" not in {stage.name for stage in idle.phases}, "nothing of the loop asks for it"


def test_the_prompt_of_the_llm_needs_its_slots(tmp_path: Path) -> None:
    from vpo_ray.plan import PlanError

    (tmp_path / "p.txt").write_text("Write {count} prompts for {query}", "utf-8")
    with pytest.raises(PlanError, match=r"evolve.prompt: .*needs the slot {history} once"):
        plan(recipe_at(tmp_path, f"evolve.prompt={tmp_path}/p.txt"))


def test_what_refine_stores_is_known_by_all_that_it_depends_on(tmp_path: Path) -> None:
    gate = "gate={options: {words: [3, 5]}, least: {length: 1}}"
    plain, gated, other = (
        of_query(recipe_at(tmp_path, *more), "a cat", 3, None).out
        for more in ([], [gate], [gate, "gate.least.length=0.5"])
    )
    assert len({plain, gated, other}) == 3
