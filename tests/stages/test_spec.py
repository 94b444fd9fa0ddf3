"""A stage of one's own is one file and one entry. Here it is this file: `translate`, before sampling.

Small functions stand in for the models of the other stages; the stream, its tables and its workers are real.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from vpo_ray import cli
from vpo_ray.cli import doctor, submit
from vpo_ray.files.folder import StorageError
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.plan import estimate, show
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import FEEDBACK, Row, query_id
from vpo_ray.stages import made_with, spec
from vpo_ray.stages.chains import CHAINS
from vpo_ray.stages.spec import Making, StageError, StageSpec
from vpo_ray.storage.run_dir import TABLES, RunDir
from vpo_ray.stream.pipeline import GenerationError, Models, generate
from vpo_ray.stream.placement import pool_shapes

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
MODELS = Models("nowhere", "test-policy")
QUERIES = ("eine Katze", "zwei Hunde", "das Meer")
WORDS = {"eine Katze": "a cat", "zwei Hunde": "two dogs", "das Meer": "the sea"}


class Translator:
    """Adds a query's English. A file at `fault` stops it at its second query, as a full disk would."""

    name = "translate"

    def __init__(self, fault: Path) -> None:
        self.fault = fault

    def wants(self, row: Row) -> bool:
        return row["english"] is None and row["error"] is None

    def __call__(self, rows: list[Row]) -> list[Row]:
        if self.fault.exists() and any(row["query"] == QUERIES[1] for row in rows):
            raise StorageError("no dictionary")
        return [{**row, "english": WORDS[row["query"]]} for row in rows]


def make_translator(making: Making) -> Callable[[], Translator]:
    return partial(Translator, Path(making.recipe.out) / "fault")


TRANSLATE = StageSpec(
    "translate",
    "generation",
    "translations",
    "judge",
    runs_on="batch",
    make=make_translator,
    facts=lambda recipe: [("dictionary", "edition 1")],
    settings=("judge",),
    help="queries/ to translations/ with a dictionary",
    columns=[pa.field("english", pa.string())],
)


class Small:
    """A stage of the package without its model: it fills the column that the next stage looks at."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wants(self, row: Row) -> bool:
        return row["error"] is None and all(row[column] is None for column in self._of(row))

    def __call__(self, rows: list[Row]) -> list[Row]:
        return [{**row, **self._of(row)} for row in rows]

    def _of(self, row: Row) -> Row:
        return {
            "sample": {"prompt": f"{row['english']}, in fine detail"},
            "judge": {"verdict": "aligned"},
            "render": {"video_key": row["candidate_id"]},
            "score": {"score": float(row["k"])},
        }[self.name]


@pytest.fixture
def registered() -> Iterator[None]:
    stages, tables = dict(spec.STAGES), dict(TABLES)
    spec.register(TRANSLATE, before="sample")
    yield
    for known, before in ((spec.STAGES, stages), (TABLES, tables)):
        known.clear()
        known.update(before)  # type: ignore[arg-type]


@pytest.fixture
def small(registered: None, ray_cluster: None) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    for name in ("sample", "judge", "render", "score"):
        make = partial(_make_small, name)
        spec.STAGES[name] = replace(spec.stage(name), runs_on="batch", calls=lambda recipe: 1, make=make)


def _make_small(name: str, making: Making) -> Callable[[], Small]:
    return partial(Small, name)


def recipe_for(tmp_path: Path) -> list[str]:
    """Overrides of the tiny recipe: models that are not here, replicas that take hardly a CPU."""
    pools = [f"{key}.pool={{size: 1, num_cpus: 0.1}}" for key in ("sample", "judge", "render", "reward")]
    models = [f"{key}.model=some/model" for key in ("policy", "judge", "render", "reward")]
    return [*pools, *models, "sft=null", "dpo=null", "sample.k=2", "judge.engine.batch_size=2",
            f"out={tmp_path / 'run'}"]  # fmt: skip


def run_of(recipe: Recipe) -> RunDir:
    run = RunDir(recipe.out)
    rows = [{"query_id": query_id(q), "query": q, "source": "t", "split": "dpo"} for q in QUERIES]
    run.table("queries").append(rows)
    return run


@pytest.mark.ray
def test_a_stage_of_ones_own_streams_resumes_and_is_counted(small: None, tmp_path: Path) -> None:
    recipe = load(TINY, recipe_for(tmp_path))
    run = run_of(recipe)
    Path(recipe.out, "fault").touch()
    with pytest.raises(GenerationError, match="no dictionary"):
        generate(recipe, run, MODELS)
    assert len(run.table("translations").keys()) < 6
    stopped = reconcile(build_ledger(run, recipe))
    assert any(line.startswith("translate: 6 in") for line in stopped), stopped

    Path(recipe.out, "fault").unlink()
    kept = run.table("translations").count()
    counts = generate(recipe, run, MODELS)
    assert counts["translate"]["done"] == 6 - kept, "what was translated is kept"
    assert counts["sample"]["done"] <= 6
    rows = {row["candidate_id"]: row for row in run.table("feedback").rows()}
    queries = list(run.table("queries").rows())
    assert rows.keys() == {
        row["candidate_id"] for row in CHAINS["generation"].expand(recipe, MODELS)(queries)
    }
    for row in rows.values():
        assert row["english"] == WORDS[row["query"]]
        assert row["prompt"] == f"{row['english']}, in fine detail"
        assert row["seconds"]["translate"] >= 0
    ledger = build_ledger(run, recipe)
    assert [line for line in reconcile(ledger) if not line.startswith("pair")] == []
    assert list(ledger["stages"])[1:6] == ["translate", "sample", "judge", "render", "score"]
    assert (ledger["stages"]["translate"]["in"], ledger["stages"]["translate"]["out"]) == (6, 6)
    assert run.read_json("made_with/translate.json") == {"dictionary": "edition 1"}

    assert sum(count["done"] for count in generate(recipe, run, MODELS).values()) == 0


@pytest.mark.ray
def test_a_stage_of_ones_own_has_a_command_and_a_place_in_the_cluster(small: None, tmp_path: Path) -> None:
    sets = recipe_for(tmp_path)
    recipe = load(TINY, sets)
    run = run_of(recipe)
    arguments = [word for item in sets for word in ("--set", item)]
    assert cli.main(["translate", TINY, *arguments]) == 0
    assert {row["english"] for row in run.table("translations").rows()} == set(WORDS.values())
    assert run.table("candidates").count() == 0
    assert run.read_json("ledger.json")["stages"]["translate"]["out"] == 6

    # It runs on the judge's pool: where that has no room, there are two who say so.
    without = load(TINY, [*sets, "judge.pool={size: 1, num_cpus: 0.1, resources: {nowhere: 1}}"])
    wrong = [finding for finding in doctor._placement(without) if not finding.ok]
    assert [finding.found.split(":")[0] for finding in wrong] == ["judge.pool", "judge.pool"]


def test_a_stage_of_ones_own_is_planned_and_submitted(registered: None, tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text("\n".join(f'{{"query": "{query}"}}' for query in QUERIES), "utf-8")
    checklist = tmp_path / "checklist.yaml"
    checklist.write_text("questions:\n- {question: 'Is it sharp?', weight: 1, dimension: quality}\n", "utf-8")
    sets = [f"queries.path={queries}", "queries.splits={dpo: 1}", f"reward.checklist.file={checklist}"]
    recipe = load(TINY, [*recipe_for(tmp_path), *sets])
    plan = estimate.plan(recipe)
    assert [stage.name for stage in plan.stages] == ["translate", "sample", "judge", "render", "score"]
    assert [stage.rows for stage in plan.stages[:2]] == [6, 6]
    assert "translate" in show.text(plan)
    assert pool_shapes(recipe, ("translate",))[0].where == "judge.pool"
    assert "translate" in submit.commands()
    assert made_with.facts(recipe, "translate") == {"dictionary": "edition 1"}


def test_without_it_all_is_as_it_was() -> None:
    assert spec.names("generation") == ("sample", "judge", "render", "score")
    assert all(TABLES[stage.table][0] == FEEDBACK for stage in spec.stages("generation"))


def test_what_cannot_be_registered(registered: None) -> None:
    spec.register(TRANSLATE, before="sample")  # once more: nothing happens
    assert spec.names("generation").count("translate") == 1
    other = replace(TRANSLATE, name="upscale", table="upscaled", columns=[])
    kept = dict(TABLES)
    for wrong, before, says in (
        (replace(TRANSLATE, table="other"), None, "a stage translate or a table other is there already"),
        (replace(other, table="renders"), None, "a stage upscale or a table renders"),
        (replace(other, name="Up-scale"), None, "'Up-scale' is no name for a stage"),
        (replace(other, table="../upscaled"), None, "'../upscaled' is no name for a table"),
        (other, "draft", "no stage draft is in the chain generation"),
        (replace(other, chain="generating"), None, "chain 'generating': write one of labelling, drafting"),
        (replace(other, runs_on="gpu"), None, "runs_on 'gpu': write one of policy, chat, batch"),
        (replace(other, columns=["sharp"]), None, "column sharp: give a field"),
        (replace(other, columns=[pa.field("score", pa.float64())]), None, "column score: give a field"),
        (replace(other, columns=[pa.field("sharp", pa.string(), nullable=False)]), None, "column sharp: "),
        (replace(other, columns=[pa.field("sharp", pa.string())] * 2), None, "column sharp: "),
    ):
        with pytest.raises(StageError, match=re.escape(says)):
            spec.register(wrong, before)  # type: ignore[arg-type]
    assert kept == TABLES


@pytest.mark.parametrize("name", ["plan", "runs", "pair", "generate"])
def test_a_stage_called_like_a_command_is_told(
    registered: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    spec.register(replace(TRANSLATE, name=name, table="others", columns=[]))
    assert cli.main(["--help"]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"vpo: error: a stage that was registered is called {name}, as a command of vpo is: rename it\n"
    )
