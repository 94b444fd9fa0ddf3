"""The `vpo` command: what it takes, what it says when it cannot go on, and what needs no engine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vpo_ray import cli
from vpo_ray import recipe as recipes
from vpo_ray.loop import opening
from vpo_ray.recipe import Recipe
from vpo_ray.records import content_id
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream import connection

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "jobs/recipes/tiny.yaml")
RECIPE = ["recipe", "--help", "--out", "--set"]
COMMANDS = {
    "init": [
        "recipe",
        "--help",
        "--example",
        "--video",
        "--reward",
        "--judge",
        "--policy",
        "--gpus",
        "--queries",
        "--models",
        "--out",
        "--force",
    ],
    "run": [*RECIPE, "--retry-errors", "--rounds"],
    "plan": [
        *RECIPE,
        "--ledger",
        "--queries",
        "--price-per-gpu-hour",
        "--json",
        "--gpus",
        "--gpus-per-node",
        "--gpu-type",
        "--cpus",
        "--address",
    ],
    "fetch": [*RECIPE, "--to", "--list"],
    "submit": [
        *RECIPE,
        "--command",
        "--shards",
        "--address",
        "--working-dir",
        "--retry-errors",
        "--follow",
        "--print-id",
    ],
    "status": ["DIR", "--help", "--out", "--json"],
    "runs": ["DIR", "--help", "--out", "--json"],
    "logs": ["DIR", "--help", "--out", "--stage", "--row"],
    "doctor": ["recipe", "--help", "--out", "--set", "--json"],
    "tiny": ["DIR", "--help"],
    "world": ["DIR", "--help"],
    "curate": RECIPE,
    "draft": [*RECIPE, "--retry-errors"],
    "evolve": [*RECIPE, "--retry-errors"],
    "sft": RECIPE,
    "generate": [*RECIPE, "--retry-errors", "--shard"],
    "sample": [*RECIPE, "--retry-errors", "--shard"],
    "judge": [*RECIPE, "--retry-errors", "--shard"],
    "render": [*RECIPE, "--retry-errors", "--shard"],
    "score": [*RECIPE, "--retry-errors", "--shard"],
    "pair": RECIPE,
    "group": RECIPE,
    "rl": RECIPE,
    "dpo": RECIPE,
    "train": RECIPE,
    "evaluate": [
        *RECIPE,
        "--retry-errors",
        "--fail-below",
        "--no-worse-than",
        "--by",
        "--export",
        "--to",
        "--import-vbench",
    ],
    "report": RECIPE,
    "refine": [
        "QUERY",
        "--help",
        "--recipe",
        "--budget",
        "--image",
        "--out",
        "--set",
        "--retry-errors",
        "--json",
    ],
    "compare": ["ACTION", "--help"],
    "videos": ["ACTION", "--help"],
    "collect": ["store", "--help", "--to", "--json"],
    "forget": ["store", "--help", "--key", "--answer", "--older-than", "--collected"],
    "plugins": ["--help"],
    "schema": ["--help", "--markdown"],
    "export": [*RECIPE, "--format", "--to", "--bare"],
    "push": [*RECIPE, "--policy", "--data", "--public", "--license"],
    "serve": ["checkpoint", "--help", "--recipe", "--set", "--config"],
    "deploy": [*RECIPE, "--checkpoint", "--timeout"],
    "key": ["NAME", "--help"],
}


@pytest.fixture
def vpo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a command on tiny.yaml with a run directory of this test; gives status, stdout, stderr."""

    def run(command: str, *arguments: str, recipe: str = TINY) -> tuple[int, str, str]:
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "run")]
        status = cli.main([command, recipe, *out, *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def sets(**values: Any) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def one_line(stderr: str) -> str:
    """The error as a user sees it: our own line, no trace of Python."""
    assert "Traceback" not in stderr
    assert stderr.count("vpo: error: ") == 1
    return stderr[stderr.index("vpo: error: ") :]


# The command line is a contract


def test_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = help_of(capsys)
    assert re.findall(r"^    (\w+)  ", text, re.MULTILINE) == list(COMMANDS)
    assert "vpo world runs/world && vpo run laptop, or vpo init" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = help_of(capsys, command)
    positional = re.findall(r"^  (\w+)(?:  |$)", text, re.MULTILINE)
    options = re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE)
    assert [*positional, *options] == COMMANDS[command]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trainn", "none.yaml"],
        ["plan"],
        ["run", "none.yaml", "--retry"],
        ["plan", "none.yaml", "--retry-errors"],
        ["curate", "none.yaml", "--o", "x"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: vpo" in capsys.readouterr().err


# Errors


@pytest.mark.parametrize("command", ["plan", "run", "curate", "sample", "dpo", "report"])
def test_a_bad_recipe_stops_every_command_with_one_message(vpo: Any, command: str, tmp_path: Path) -> None:
    status, out, err = vpo(command, *sets(render__stepz=3))
    assert (status, out) == (2, "")
    assert "render.stepz: unknown key; did you mean `steps`?" in one_line(err)
    status, _, err = vpo(command, recipe=str(tmp_path / "none.yaml"))
    assert status == 2
    assert "none.yaml: cannot read the recipe (No such file or directory)" in one_line(err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["plan", "run"])
def test_what_is_not_there_is_told_before_anything_starts(vpo: Any, command: str, tmp_path: Path) -> None:
    """A plan is made of the rest, and ends with another status."""
    gone = tmp_path / "none"
    status, out, err = vpo(command, *sets(policy__model=gone, reward__model=gone))
    if command == "plan":
        assert (status, err) == (5, "")
    else:
        assert (status, out) == (2, "")
        one_line(err)
    assert f"policy.model: no such folder: {gone}" in out + err
    assert f"reward.model: no such folder: {gone}" in out + err
    assert not (tmp_path / "run").exists()


def test_a_serve_setting_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "none", "--set", "serve.prot=1"]) == 2
    assert "serve.prot: unknown key" in one_line(capsys.readouterr().err)


def test_an_interrupt_says_how_to_go_on(vpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vpo_ray.plan.plan", interrupted)
    status, _, err = vpo("plan")
    assert status == 130
    assert "the same command goes on where this stopped" in one_line(err)


def test_a_failure_of_ours_shows_its_trace_for_a_bug_report(
    vpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("vpo_ray.plan.plan", broken)
    status, _, err = vpo("plan")
    assert status == 1
    assert "Traceback" in err
    assert "vpo: error: ZeroDivisionError" in err


# Commands that need no engine


def test_plan_of_the_tiny_recipe(vpo: Any, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folders = {"policy": "policy", "judge": "judge", "render": "video", "reward": "reward"}
    models = {f"{section}__model": tiny_models / folder for section, folder in folders.items()}
    checklist = tiny_models / "reward/checklist.yaml"
    status, out, err = vpo("plan", *sets(**models, reward__checklist__file=checklist))
    assert (status, err) == (0, "")
    queries = (ROOT / "vpo_ray/data/queries.jsonl").read_text("utf-8").splitlines()
    assert f"{len(queries)} rows read" in out
    assert "ZeRO-3" in out


@pytest.mark.parametrize(
    "name", ["with: colon", "123", "null", "[a, b]", "# hash", "é\U0001f600", 'it\'s "x"']
)
def test_any_folder_may_be_the_run_directory(vpo: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "q.txt").write_text("a cat\n", "utf-8")
    status, out, err = vpo("curate", *sets(queries__path=tmp_path / "q.txt"), "--out", str(tmp_path / name))
    assert status == 0, err
    assert out == f"curate: done, see {tmp_path / name}/ledger.json\n"
    assert RunDir(tmp_path / name).table("queries").count() == 1


def test_curate_writes_what_it_kept_and_dropped_once(vpo: Any, tmp_path: Path) -> None:
    queries = tmp_path / "q.txt"
    queries.write_text("a cat\n\na dog\na cat\n", "utf-8")
    assert vpo("curate", *sets(queries__path=queries))[0] == 0
    run = RunDir(tmp_path / "run")
    before = run.files()
    assert run.table("queries").count() == 2
    assert Counter(row["reason"] for row in run.table("dropped").rows()) == {"empty": 1, "duplicate": 1}
    assert run.read_json("ledger.json")["stages"]["curate"]["in"] == 4
    assert vpo("curate", *sets(queries__path=queries))[0] == 0
    assert run.files() == before


def test_a_run_directory_of_another_recipe_names_the_keys(vpo: Any, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("a cat\n", "utf-8")
    path = sets(queries__path=tmp_path / "q.txt")
    assert vpo("curate", *path, *sets(sample__k=4, render__steps=3))[0] == 0
    stored = (tmp_path / "run/recipe.yaml").read_bytes()
    status, _, err = vpo(
        "curate", *path, *sets(sample__k=5, render__steps=9, serve__port=1, render__batch_size=2)
    )
    assert status == 2
    message = one_line(err)
    assert "sample.k: 4 -> 5" in message
    assert "render.steps: 3 -> 9" in message
    assert "port" not in message
    assert "batch_size" not in message
    assert "another `out`" in message
    assert (tmp_path / "run/recipe.yaml").read_bytes() == stored
    same = sets(sample__k=4, render__steps=3, serve__port=1, render__batch_size=2)
    assert vpo("curate", *path, *same)[0] == 0


@pytest.mark.parametrize(
    ("text", "says"), [("", "the input holds no rows"), ("\n \n\n", "all 3 rows were dropped")]
)
def test_input_without_a_query(vpo: Any, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "q.txt").write_text(text, "utf-8")
    for _ in range(2):
        status, _, err = vpo("curate", *sets(queries__path=tmp_path / "q.txt"))
        assert status == 2
        assert says in one_line(err)


def scored(query: str, k: int, score: float) -> dict[str, Any]:
    """A finished candidate; the prompts are the same for every query."""
    return {
        "candidate_id": content_id(query, k),
        "query_id": content_id(query),
        "query": query,
        "k": k,
        "seed": k,
        "prompt": f"prompt {k}",
        "verdict": "aligned",
        "video_key": content_id(k),
        "answers": [],
        "dimensions": [],
        "score": score,
    }


def test_pairs_are_of_one_query(vpo: Any, tmp_path: Path) -> None:
    """Widest over all is a video of one query against one of another; no pair mixes them."""
    run, margin = RunDir(tmp_path / "run"), sets(pair__margin=0.5, pair__dominance="none")
    rows = [scored(f"query {n}", k, 10.0 * n + k) for n in range(20) for k in (0, 1)]
    run.table("feedback").append(rows[::2])
    run.table("feedback").append(rows[1::2])
    assert vpo("pair", *margin)[0] == 0
    pairs = list(run.table("pairs").rows())
    assert len(pairs) == 20
    owners = {row["candidate_id"]: row["query"] for row in rows}
    for pair in pairs:
        assert owners[pair["chosen_id"]] == owners[pair["rejected_id"]] == pair["query"]
        assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("prompt 1", "prompt 0", 1.0)
    stored = run.table("pairs").parts()
    assert vpo("pair", *margin)[0] == 0
    assert run.table("pairs").parts() == stored


def test_no_pairs_says_why(vpo: Any, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.table("feedback").append([scored("query", 0, 1.0), scored("query", 1, 1.01)])
    status, _, err = vpo("pair", *sets(pair__margin=0.5))
    assert status == 1
    assert "margin too small" in one_line(err)
    assert "Lower pair.margin" in err


# Stopped from outside


def _stop_in_the_middle(recipe: Recipe, run: RunDir) -> None:
    with opening.accounted(recipe, run):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


def test_a_terminated_run_leaves_its_ledger(tmp_path: Path) -> None:
    recipe = recipes.load(TINY, [f"out={tmp_path / 'run'}"])
    run = opening.open_run(recipe)
    before = signal.signal(signal.SIGTERM, connection.terminate)
    try:
        with pytest.raises(connection.Terminated):
            _stop_in_the_middle(recipe, run)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb what is left to do
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run.read_json("ledger.json")["stages"]


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (connection.Terminated, 143)])
def test_the_exit_status_tells_who_stopped_it(
    vpo: Any, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], status: int
) -> None:
    def stopped(*_: Any) -> int:
        raise stop

    monkeypatch.setattr("vpo_ray.cli.plan.run", stopped)
    told = vpo("plan")
    assert told[0] == status
    assert "the same command goes on where this stopped" in one_line(told[2])


def test_a_recipe_of_the_users_own_is_not_overwritten(vpo: Any, tmp_path: Path) -> None:
    own = tmp_path / "recipe.yaml"
    own.write_text(f"# mine\n{Path(TINY).read_text('utf-8')}", "utf-8")
    status, _, err = vpo("curate", "--out", str(tmp_path))
    assert status == 2
    assert "holds a recipe.yaml that no run wrote" in one_line(err)
    assert own.read_text("utf-8").startswith("# mine\n")


def test_a_folder_of_the_packages_name_in_the_working_directory_hides_nothing(tmp_path: Path) -> None:
    """A job's working directory may hold `vpo_ray/data/sft.jsonl` and no code: a namespace package, which
    Python finds before one that is installed in editable mode."""
    (tmp_path / "vpo_ray/data").mkdir(parents=True)
    shutil.copy(ROOT / "vpo_ray/data/queries.jsonl", tmp_path / "vpo_ray/data")
    command = [sys.executable, "-m", "vpo_ray.cli", "curate", str(ROOT / "jobs/recipes/tiny.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--out", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/queries").is_dir()
