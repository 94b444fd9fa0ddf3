"""Previews over stored tables: killed anywhere, they end at the same videos; below the bound none chooses."""

import random
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.files.folder import chunks
from vpo_ray.loop.ledger import build_ledger, funnel, reconcile
from vpo_ray.loop.opening import OtherRecipeError, open_run
from vpo_ray.recipe import Recipe, RecipeError, load
from vpo_ray.records import FEEDBACK, Row, Shard, content_id, failed
from vpo_ray.stages.adaptive import ALONE
from vpo_ray.stages.preview import BETWEEN, MEASURED, UNSCORED, preview_run
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.tables import Table
from vpo_ray.stream.passes import Pass
from vpo_ray.stream.pipeline import GenerationError, Models, generate
from vpo_ray.stream.previews import PreviewError, Previews

QUERIES, K, PROBE = 8, 4, 3
TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
BOTH = ("render", "score")
LOOK = ["render.preview.steps=1", f"render.preview.probe={PROBE}", "render.preview.agreement=0.6"]


def recipe_at(folder: Path, *more: str) -> Recipe:
    return load(TINY, [f"out={folder}", *LOOK, *more])


def judged(query: int, k: int) -> Row:
    """Some candidates are misaligned, some repeat a prompt, one has failed."""
    draw = random.Random(f"judge {query} {k}")
    row = dict.fromkeys(FEEDBACK.names)
    key = f"q{query} قطة 🐈\u202e"
    row |= {"candidate_id": content_id(query, k), "query_id": f"{query:032}", "query": key}
    row |= {"k": k, "seed": 1, "prompt": f"{key}: {draw.randint(0, 9)}", "verdict": "aligned"}
    if draw.random() < 0.15:
        row["verdict"] = "imprecise"
    return failed(row, "judge", "no verdict") if draw.random() < 0.04 else row


def judged_run(recipe: Recipe, queries: int = QUERIES, k: int = K) -> RunDir:
    run = RunDir(recipe.out)
    run.table("queries").append(
        [{"query_id": f"{i:032}", "query": f"q{i} قطة 🐈\u202e", "split": "dpo"} for i in range(queries)]
    )
    rows = [judged(query, number) for query in range(queries) for number in range(k)]
    run.table("candidates").append([row | {"verdict": None} for row in rows])
    run.table("verdicts").append(rows)
    return run


class Killed(Exception):
    pass


class Worker:
    """Does the passes of a call in place of the stream: it may be killed between any two writes.

    noise: how far a preview's score is from that of the full render.
    """

    def __init__(self, order: random.Random, noise: float = 0.02, faults: bool = True) -> None:
        self.order, self.noise, self.faults = order, noise, faults
        self.made: list[tuple[bool, str]] = []  # whether it is a preview, and its candidate

    def work(self, run: RunDir, recipe: Recipe, retry: bool = False) -> None:
        for each in Previews(Pass(recipe, run, Models("", ""), BOTH, retry)).passes():
            self._finish(each)

    def _finish(self, this: Pass) -> None:
        looks = "/preview/" in this.run.uri
        finished, rendered = (this.table(name) for name in ("score", "render"))
        done, there = (
            {
                row["candidate_id"]: row
                for row in table.rows()
                if row["error"] is None or not this.retry_errors
            }
            for table in (finished, rendered)
        )
        chosen = None if this.render_ids is None else {name.decode() for name in this.render_ids.tolist()}
        waiting = [row for name, row in there.items() if name not in done]
        verdicts = {row["candidate_id"]: row for row in this.run.table("verdicts").rows()}
        wanted = verdicts.keys() - done.keys() - there.keys() if chosen is None else chosen
        new = [verdicts[name] for name in sorted(wanted)]
        for rows in chunks(self.order.sample(new, len(new)), 3):
            made = [self._rendered(row, looks) for row in rows]
            self._write(rendered, made)
            waiting += made
        for rows in chunks(self.order.sample(waiting, len(waiting)), 3):
            self._write(finished, [self._scored(row, looks) for row in rows])

    def _write(self, table: Table, rows: list[Row]) -> None:
        if self.order.random() < 0.15:
            raise Killed
        table.append(rows)

    def _rendered(self, row: Row, looks: bool) -> Row:
        if row["verdict"] != "aligned" or row["error"] is not None:
            return row
        self.made.append((looks, row["candidate_id"]))
        share = 0.3 if looks else 0.1
        if self.faults and random.Random(f"render {looks} {row['prompt']}").random() < share:
            return failed(row, "render", "black frames")
        return row | {
            "video_key": content_id(looks, row["prompt"]),
            "seconds": {"render": 1.0 if looks else 4.0},
        }

    def _scored(self, row: Row, looks: bool) -> Row:
        if row["video_key"] is None or row["error"] is not None:
            return row
        score = random.Random(f"score {row['prompt']}").random()
        if looks:
            score += random.Random(f"look {row['prompt']}").gauss(0, self.noise)
        return row | {"score": score, "answers": [], "dimensions": []}


class Steady(random.Random):
    """Never kills."""

    def random(self) -> float:
        return 0.9


def state(run: RunDir) -> dict[str, Any]:
    rows = run.table("feedback").rows()
    return {row["candidate_id"]: (row["score"], row["skipped"], row["error"]) for row in rows}


def test_a_kill_anywhere_changes_no_video_and_asks_for_none_twice(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path / "whole")
    whole, worker = judged_run(recipe), Worker(Steady(0))
    worker.work(whole, recipe)
    complete, measured = state(whole), whole.read_json(MEASURED)
    assert len(complete) == QUERIES * K
    assert {BETWEEN, UNSCORED} < {skipped for _, skipped, _ in complete.values()}
    assert measured["probe"] == [f"{i:032}" for i in range(PROBE)]
    assert measured["agreement"] > 0.6
    assert len(set(worker.made)) == len(worker.made), "nothing is rendered twice"
    of_probe = [row for row in whole.table("feedback").rows() if row["query_id"] in measured["probe"]]
    assert all(row["skipped"] != BETWEEN for row in of_probe), "the probe is rendered whole"
    for query in range(PROBE, QUERIES):
        rows = [row for row in whole.table("feedback").rows() if row["query_id"] == f"{query:032}"]
        assert sum(row["video_key"] is not None for row in rows) <= 2
    worker.work(whole, recipe)
    assert len(set(worker.made)) == len(worker.made), "a second call does nothing"
    for seed in range(2):
        recipe = recipe_at(tmp_path / str(seed))
        run, kills = judged_run(recipe), 0
        worker = Worker(random.Random(seed))
        while True:
            try:
                worker.work(run, recipe)
                break
            except Killed:
                kills += 1
        assert kills > 2
        assert state(run) == complete
        assert run.read_json(MEASURED) == measured
        written = state(preview_run(recipe, run))
        assert written == state(preview_run(recipe_at(tmp_path / "whole"), whole))


def test_the_ledger_counts_every_candidate_and_every_preview(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path)
    run, worker = judged_run(recipe), Worker(Steady(0))
    before = build_ledger(run, recipe)["stages"]["preview"]
    assert (before["in"], before["out"], before["probe"]) == (0, 0, None)
    worker.work(run, recipe)
    ledger = build_ledger(run, recipe)
    assert [p for p in reconcile(ledger) if not p.startswith("pair")] == []
    stages = ledger["stages"]
    assert (
        list(stages).index("judge") + 1 == list(stages).index("preview") == list(stages).index("render") - 1
    )
    looks, full = ([name for looks, name in worker.made if looks is which] for which in (True, False))
    entry = stages["preview"]
    assert entry["in"] == len(looks) == entry["out"] + sum(entry["errored"].values())
    assert set(entry["errored"]) == {"black frames"}
    assert entry["seconds"] == entry["out"] * 1.0
    assert entry["probe"]["probe"] == PROBE
    assert stages["render"]["out"] + sum(stages["render"]["errored"].values()) == len(full)
    assert {BETWEEN, UNSCORED, ALONE} & set(stages["render"]["skipped"])
    shown = funnel(ledger)
    assert list(shown) == ["queries", "candidates", "aligned", "previews", "videos", "pairs"]
    assert shown["previews"] == entry["out"] > shown["videos"]


def test_below_the_bound_nothing_is_chosen(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path, "render.preview.agreement=0.95")
    run, worker = judged_run(open_and_recipe(recipe)), Worker(Steady(0), noise=5.0, faults=False)
    with pytest.raises(
        PreviewError, match=r"previews order 0\.\d+ .*below render.preview.agreement 0.95"
    ) as told:
        worker.work(run, recipe)
    assert all(word in str(told.value) for word in ("more steps", "larger size", "leave render.preview out"))
    made = len(worker.made)
    assert {row["query_id"] for row in run.table("feedback").rows()} == {f"{i:032}" for i in range(PROBE)}
    assert not run.read_json(MEASURED).get("chosen")
    with pytest.raises(PreviewError):
        worker.work(run, recipe)
    assert len(worker.made) == made, "it is refused again for nothing"

    # The same run directory goes on with better previews.
    better = recipe_at(tmp_path, "render.preview.agreement=0.95", "render.preview.steps=2")
    assert preview_run(better, run).uri != preview_run(recipe, run).uri
    open_run(better)
    again = Worker(Steady(0), noise=0.0, faults=False)
    again.work(run, better)
    assert not {name for looks, name in again.made if not looks} & {
        name for looks, name in worker.made if not looks
    }
    assert run.read_json(MEASURED)["chosen"] is True
    # What was chosen by these is not mixed with what others choose.
    with pytest.raises(OtherRecipeError, match=r"render.preview.steps: 2 -> 1"):
        open_run(recipe)
    with pytest.raises(OtherRecipeError, match=r"render.preview"):
        open_run(load(TINY, [f"out={tmp_path}"]))


def open_and_recipe(recipe: Recipe) -> Recipe:
    open_run(recipe)
    return recipe


def test_without_previews_a_refused_run_renders_all(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path, "render.preview.agreement=1.0")
    run = judged_run(open_and_recipe(recipe))
    with pytest.raises(PreviewError):
        Worker(Steady(0), noise=5.0).work(run, recipe)
    plain = load(TINY, [f"out={tmp_path}"])
    open_run(plain)
    assert "preview" not in build_ledger(run, plain)["stages"]


def test_a_probe_that_tells_nothing_stops_the_run(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path)
    run = judged_run(recipe)

    class Broken(Worker):
        def _rendered(self, row: Row, looks: bool) -> Row:
            done = super()._rendered(row, looks)
            return failed(row, "render", "no device") if looks and done["video_key"] else done

    with pytest.raises(PreviewError, match=r"the probe says nothing.*Enlarge render.preview.probe"):
        Broken(Steady(0)).work(run, recipe)
    Worker(Steady(0), faults=False).work(run, recipe, retry=True)
    assert len(state(run)) == QUERIES * K, "previews that failed are made again on request"
    assert UNSCORED not in {skipped for _, skipped, _ in state(run).values()}


def test_a_retry_makes_previews_and_renders_that_failed(tmp_path: Path) -> None:
    clean, run = (judged_run(recipe_at(tmp_path / name)) for name in ("clean", "run"))
    Worker(Steady(0), faults=False).work(clean, recipe_at(tmp_path / "clean"))
    recipe = recipe_at(tmp_path / "run")
    Worker(Steady(0)).work(run, recipe)
    assert UNSCORED in {skipped for _, skipped, _ in state(run).values()}
    Worker(Steady(0), faults=False).work(run, recipe, retry=True)
    best = {name: row for name, row in state(run).items() if row[0] is not None}
    wanted = {name for name, row in state(clean).items() if row[0] is not None}
    assert wanted <= best.keys(), "whoever would have been chosen is"
    looks = state(preview_run(recipe, run))
    assert all(error is None for _, _, error in looks.values())


@pytest.mark.parametrize("k", [1, 2])
def test_few_candidates(tmp_path: Path, k: int) -> None:
    recipe = recipe_at(tmp_path, f"sample.k={k}", "render.preview.probe=20")
    run, worker = judged_run(recipe, k=k), Worker(Steady(0), faults=False)
    worker.work(run, recipe)
    assert len(state(run)) == QUERIES * k
    if k == 1:
        assert worker.made == []
        assert ALONE in {skipped for _, skipped, _ in state(run).values()}
    else:
        assert run.read_json(MEASURED)["pairs"] > 0, "all are the probe, whatever they say"
    assert [p for p in reconcile(build_ledger(run, recipe)) if not p.startswith("pair")] == []


def test_shards_take_what_the_first_measured(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path / "shards")
    run = judged_run(recipe)
    # Ids of these tests begin with zeros: all are of the first shard.
    with pytest.raises(PreviewError, match="the first shard renders the probe"):
        Worker(Steady(0)).work(_pretend(run), recipe)
    looks = state(preview_run(recipe, run))
    assert looks, "its own previews are made meanwhile"
    Worker(Steady(0)).work(RunDir(run.uri, Shard(1, 3)), recipe)
    whole = recipe_at(tmp_path / "whole")
    other = judged_run(whole)
    Worker(Steady(0)).work(other, whole)
    assert state(run) == state(other)


def _pretend(run: RunDir) -> RunDir:
    """The run for the driver of a later shard that has all queries."""

    class Later(Shard):
        @property
        def rows(self) -> Any:
            return Shard(1, 1).rows

    return RunDir(run.uri, Later(2, 3))


def test_rendering_alone_is_refused(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path)
    with pytest.raises(GenerationError, match=r"run `vpo generate`"):
        generate(recipe, judged_run(recipe), Models("", ""), ("render",))


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        (["render.strategy=adaptive"], "does not go together with strategy: adaptive"),
        (["pair.choice=all"], "pair.choice: all looks at all of them"),
        (["pair.ranks=1"], "pair.ranks looks at all of them"),
        (["dpo=null", "pair={}", "rl={epochs: 1, lr: 1.0e-6, global_batch: 8}"], "rl looks at all of them"),
        (["render.preview.steps=3"], "nothing that differs"),
        (["render.preview={}"], "nothing that differs"),
        (["render.preview.steps=9"], r"preview.steps: 9 is more than steps: 3"),
        (["render.preview.keep=1"], "greater than or equal to 2"),
        (["render.preview.agreement=0"], "greater than 0"),
        (["render.preview.request={size: 3x4}"], r"preview.request has no effect with kind: diffusers"),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, sets: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        recipe_at(tmp_path, *sets)
