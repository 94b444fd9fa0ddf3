"""A job's id names the run; a second submission of it is refused. The cluster here is an HTTP endpoint
that answers as Ray's job API does; test_jobs.py submits to a real one."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from vpo_ray.cli import main, submit
from vpo_ray.cli.submit import submission_id
from vpo_ray.recipe import load
from vpo_ray.records import Shard

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")


def test_the_id_is_a_function_of_what_is_run_and_where(tmp_path: Path) -> None:
    recipe = load(TINY, [f"out={tmp_path}"])
    name = submission_id(recipe, "run")
    assert name == submission_id(load(TINY, [f"out={tmp_path}", "render.pool.num_cpus=0.5"]), "run")
    assert name.startswith("vpo-tiny-run-")
    others = [
        submission_id(load(TINY, [f"out={tmp_path}", "seed=8"]), "run"),
        submission_id(load(TINY, [f"out={tmp_path / 'b'}"]), "run"),
        submission_id(recipe, "generate"),
    ]
    assert len({name, *others}) == 4


def test_a_relative_and_an_absolute_out_are_one_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absolute = Path(TINY).resolve()
    monkeypatch.chdir(tmp_path)
    ids = {submission_id(load(absolute, [f"out={out}"]), "run") for out in ("a", str(tmp_path / "a"))}
    assert len(ids) == 1


class Jobs:
    """What the API knows: jobs by submission id."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}

    def add(self, name: str, status: str, **more: Any) -> None:
        self.jobs[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "status": status,
            "entrypoint": "x",
            **more,
        }


@pytest.fixture
def jobs() -> Iterator[tuple[Jobs, str]]:
    state = Jobs()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/api/version":
                body: Any = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}
            elif self.path == "/api/jobs/":
                body = list(state.jobs.values())
            else:
                body = {} if "/packages/" in self.path else state.jobs[self.path.rsplit("/", 1)[-1]]
            self._answer(body)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer({})

        def do_POST(self) -> None:
            given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = given["submission_id"]
            if name in state.jobs:
                self._answer(f"Job with submission_id {name} already exists.", 500)
                return
            state.add(name, "PENDING", entrypoint=given["entrypoint"], runtime_env=given["runtime_env"])
            self._answer({"job_id": name, "submission_id": name})

        def _answer(self, body: Any, status: int = 200) -> None:
            data = json.dumps(body).encode() if not isinstance(body, str) else body.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with a recipe in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Path(TINY).read_text("utf-8"), "utf-8")
    return folder


def test_a_second_submission_is_refused_until_the_first_is_over(
    jobs: tuple[Jobs, str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, address = jobs
    arguments = ["submit", str(work / "recipe.yaml"), "--out", "/runs/o'ne", "--working-dir", str(work)]
    arguments += ["--address", address, "--set", "seed=3", "--retry-errors"]
    assert main(arguments) == 0
    first = capsys.readouterr().out.strip()
    job = state.jobs[first]
    assert first.endswith("-1")
    assert job["entrypoint"] == (
        "python -m vpo_ray.cli run recipe.yaml --out '/runs/o'\"'\"'ne' --set seed=3 --retry-errors"
    )
    assert job["runtime_env"]["working_dir"].startswith("gcs://")

    for status in ("PENDING", "RUNNING"):
        job["status"] = status
        assert main(arguments) == 3
        told = capsys.readouterr().err
        assert first in told
        assert f"ray job stop {first}" in told

    job["status"] = "FAILED"
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == first.removesuffix("1") + "2"
    assert main([*arguments, "--command", "generate"]) == 0, "another command is another job"


def test_what_would_be_lost_with_the_job_is_told(
    jobs: tuple[Jobs, str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["submit", str(work / "recipe.yaml"), "--working-dir", str(work), "--address", jobs[1]]
    judge = "{backend: openai, model: m, endpoint: {base_url: 'http://127.0.0.1:9/v1', answers: kept}}"
    places = ["--out", "here", "--set", "render.store=s3://bucket/videos", "--set", f"judge={judge}"]
    assert main([*arguments, *places]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "is a relative path" in line]
    assert len(told) == 2
    assert "out: here is" in told[0]
    assert "judge.endpoint.answers: kept is" in told[1]


def test_shards_are_jobs_of_their_own_each_submitted_once(
    jobs: tuple[Jobs, str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, address = jobs
    arguments = ["submit", str(work / "recipe.yaml"), "--out", "/runs/one", "--working-dir", str(work)]
    arguments += ["--address", address, "--shards", "3", "--retry-errors"]
    assert main([*arguments, "--print-id"]) == 0
    ids = capsys.readouterr().out.split()
    assert state.jobs == {}
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == list(state.jobs) == [f"{name}-1" for name in ids]
    command = "python -m vpo_ray.cli generate recipe.yaml --out /runs/one --retry-errors --shard"
    assert [job["entrypoint"] for job in state.jobs.values()] == [f"{command} {n}/3" for n in (1, 2, 3)]
    assert len({json.dumps(job["runtime_env"]) for job in state.jobs.values()}) == 1

    assert main(arguments) == 3, "all are under way"
    assert ids[0] in capsys.readouterr().err
    state.jobs[f"{ids[1]}-1"]["status"] = "FAILED"
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert told.out.split() == [f"{ids[1]}-2"]
    assert f"{ids[2]}-1" in told.err, "those that are under way are named"
    assert state.jobs[f"{ids[1]}-2"]["entrypoint"] == f"{command} 2/3"
    assert main([*arguments[:-3], "--command", "judge", "--shards", "2"]) == 0
    assert list(state.jobs.values())[-1]["entrypoint"].endswith(
        "judge recipe.yaml --out /runs/one --shard 2/2"
    )


def test_the_ids_of_shards_tell_their_number_and_those_without_stay(tmp_path: Path) -> None:
    recipe = load(TINY, [f"out={tmp_path}"])
    shards = [Shard(1, 2), Shard(2, 2), Shard(1, 4), None]
    ids = [submission_id(recipe, "generate", shard) for shard in shards]
    assert len(set(ids)) == len({name[-12:] for name in ids}) == 4
    assert ids[1].startswith("vpo-tiny-generate-2of2-")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "2", "--command", "run"], "--shards: run does not work on shards"),
        (["--shards", "0"], "--shards: 0 is not 1 or more"),
    ],
)
def test_shards_that_cannot_be(
    work: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["submit", str(work / "recipe.yaml"), "--working-dir", str(work), *options]) == 2
    assert message in capsys.readouterr().err


def test_who_comes_at_the_same_moment_is_refused_by_ray(
    jobs: tuple[Jobs, str], work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, address = jobs
    arguments = ["submit", str(work / "recipe.yaml"), "--working-dir", str(work), "--address", address]
    assert main([*arguments, "--print-id"]) == 0
    base = capsys.readouterr().out.strip()
    assert state.jobs == {}
    # The list that this submission saw is older than the other's job.
    monkeypatch.setattr(submit, "_next_attempt", lambda client, name: f"{name}-1")
    state.add(f"{base}-1", "PENDING")
    assert main(arguments) == 3
    assert "same moment" in capsys.readouterr().err


def test_a_recipe_by_a_link_in_the_working_directory(jobs: tuple[Jobs, str], work: Path) -> None:
    state, address = jobs
    (work / "recipe.yaml").rename(work.parent / "far.yaml")
    (work / "mine.yaml").symlink_to("../far.yaml")
    arguments = ["submit", str(work / "mine.yaml"), "--working-dir", str(work), "--address", address]
    assert main([*arguments, "--out", "/runs/one"]) == 0
    (job,) = state.jobs.values()
    assert job["entrypoint"] == "python -m vpo_ray.cli run mine.yaml --out /runs/one"


def test_a_recipe_of_the_package_goes_by_its_name(
    jobs: tuple[Jobs, str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every node has it: nothing but its name travels, and the working directory."""
    state, address = jobs
    named = ["--set", "reward.checklist={file: s3://b/q.yaml}", "--set", "sft.data=s3://b/s.jsonl"]
    named += ["--set", "reward.model=s3://b/reward", "--set", "queries.path=s3://b/q.jsonl"]
    arguments = ["submit", "vpo_cogvideox_2b", "--working-dir", str(work), "--address", address]
    assert main([*arguments, "--out", "/runs/one", *named]) == 0
    (job,) = state.jobs.values()
    assert job["entrypoint"].startswith("python -m vpo_ray.cli run vpo_cogvideox_2b --out /runs/one --set ")


def test_what_cannot_be_submitted_is_told(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", TINY, "--working-dir", str(work), "--address", "http://127.0.0.1:9"]) == 1
    assert "--working-dir" in capsys.readouterr().err
    nobody = ["submit", str(work / "recipe.yaml"), "--working-dir", str(work)]
    assert main([*nobody, "--address", "http://127.0.0.1:9"]) == 1
    assert "does not take the job" in capsys.readouterr().err


def test_only_commands_that_exist_can_be_submitted() -> None:
    from vpo_ray.cli.steps import step_commands

    assert set(submit.commands()) == {"run", "deploy", *step_commands()}


def test_an_option_that_the_command_does_not_take(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["submit", str(work / "recipe.yaml"), "--working-dir", str(work), "--retry-errors"]
    assert main([*arguments, "--command", "train"]) == 2
    assert "--retry-errors: train has no rows" in capsys.readouterr().err


class Followed:
    """The cluster's client: each connection gives the log from its beginning, and may drop."""

    def __init__(self, connections: list[list[Any]], status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.connections, self.status, self.code = connections, status, code

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for part in self.connections.pop(0) if len(self.connections) > 1 else self.connections[0]:
            if isinstance(part, Exception):
                raise part
            yield part

    def get_job_status(self, name: str) -> JobStatus:
        return JobStatus(self.status)

    def get_job_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(message="it ended", driver_exit_code=self.code)


def follow(*clients: Followed) -> int:
    async def all_of_them() -> int:
        return max([await submit._follow(client, "vpo-run-1") for client in clients])

    return asyncio.run(all_of_them())


def test_a_log_goes_on_where_the_connection_dropped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0)
    dropped = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
    whole = ["step 1\n", "step 2\n", "step 3\n"]
    assert follow(Followed([["step 1\nst", dropped], [OSError("refused")], whole])) == 0
    assert capsys.readouterr().out == "".join(whole)


def test_a_cluster_that_stays_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0)
    monkeypatch.setattr(submit, "SILENCE_S", 0.01)
    with pytest.raises(submit.SubmitError, match="vpo-run-1 may go on: look at it with `ray job logs"):
        follow(Followed([["step 1\n", RuntimeError("closed")], [OSError("refused")]]))


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [("FAILED", 3, 3), ("FAILED", -9, 137), ("STOPPED", None, 1), ("FAILED", 0, 1)],
)
def test_a_job_that_failed_is_no_success(status: str, code: int | None, told: int) -> None:
    assert follow(Followed([["done\n"]]), Followed([[]], status, code)) == told
