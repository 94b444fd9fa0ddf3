"""Two drivers on one run directory: the second is refused, or takes over from one that is gone."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vpo_ray import cli
from vpo_ray.files.folder import Folder
from vpo_ray.records import Shard
from vpo_ray.storage import run_lock
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.run_lock import RunInUseError, RunLock, RunLostError, driving

BEAT_S, STALE_S = 0.1, 0.5


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, seconds in {"BEAT_S": BEAT_S, "STALE_S": STALE_S, "POLL_S": 0.02}.items():
        monkeypatch.setattr(run_lock, name, seconds)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@pytest.fixture(params=["disk", "object store"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    options = request.getfixturevalue("s3_options")
    return f"s3://videos/lock-{abs(hash(request.node.name))}?{options}"


def claims(uri: str | Path) -> list[str]:
    return [name for name in Folder(uri).files() if re.fullmatch(r"lock/.*\.json", name)]


class Elsewhere:
    """A driver on another machine: its claim, which it writes again while it is `alive`."""

    def __init__(self, uri: str, name: str = "00000001-" + "0" * 32, state: str = "held") -> None:
        self.folder, self.name, self.state = Folder(uri) / "lock", f"{name}.json", state
        self.beats, self.alive = 0, threading.Event()
        self.write()

    def write(self) -> None:
        self.beats += 1
        facts = {"state": self.state, "host": "faraway", "pid": 7, "user": "mia", "since": "2001-02-03"}
        facts |= {"beats": self.beats, "process": {"machine": "another", "started": 1}}
        self.folder.write_json(self.name, facts)

    @contextmanager
    def living(self) -> Iterator[None]:
        thread = threading.Thread(target=self._live, daemon=True)
        self.alive.set()
        thread.start()
        try:
            yield
        finally:
            self.alive.clear()
            thread.join()

    def _live(self) -> None:
        while self.alive.is_set():
            self.write()
            time.sleep(BEAT_S)


def test_a_run_directory_is_had_and_given_back(uri: str) -> None:
    for _ in range(2):
        with driving(uri):
            [name] = claims(uri)
            assert json.loads(Folder(uri).read(name))["pid"] == os.getpid()
        assert claims(uri) == []


def test_it_is_given_back_after_an_error(uri: str) -> None:
    with pytest.raises(ZeroDivisionError), driving(uri):
        _ = 1 / 0
    assert claims(uri) == []


def test_one_process_may_have_it_again_inside(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with driving(tmp_path / "run"), driving(tmp_path / "link"), driving(tmp_path / "run/rounds/2"):
        assert len(Folder(tmp_path / "run/lock").files()) == 1
    assert claims(tmp_path) == []


def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    """The kernel cuts a program's name at 15 bytes, and so within a letter; another may run under Latin-1."""
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    comm.write_bytes("größer als gewöhnlich".encode()[:14] + b"\xc3")
    try:
        with driving(tmp_path):
            assert len(claims(str(tmp_path))) == 1
    finally:
        comm.write_bytes(before.strip())
    assert claims(str(tmp_path)) == []


def test_the_second_driver_is_refused_by_name(uri: str) -> None:
    other = Elsewhere(uri)
    with other.living(), pytest.raises(RunInUseError) as caught, driving(uri):
        pass
    for word in ("mia", "faraway", "process 7", "since 2001-02-03", "0 s after"):
        assert word in str(caught.value)
    assert claims(uri) == [f"lock/{other.name}"]


def test_a_driver_whose_heart_stopped_is_taken_over_whatever_its_clock_says(uri: str) -> None:
    Elsewhere(uri)
    began = time.monotonic()
    with driving(uri):
        assert time.monotonic() - began >= STALE_S
        assert len(claims(uri)) == 1
    assert claims(uri) == []


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"state": 3, "process": 5, "pid": "x"}'])
def test_a_claim_that_cannot_be_read_is_one_without_a_heartbeat(tmp_path: Path, damage: bytes) -> None:
    other = Elsewhere(str(tmp_path))
    other.folder.write(other.name, damage)
    other.folder.write("notes.txt", b"not a claim")
    with driving(tmp_path):
        assert other.name not in other.folder.files()
    assert other.folder.files() == ["notes.txt"]


def test_a_driver_that_comes_back_finds_its_run_taken_and_destroys_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    table = run.table("pairs")

    def work() -> None:
        [own] = claims(tmp_path)
        Elsewhere(str(tmp_path), "00000002-" + "0" * 32)
        for destroy in (table.compact, lambda: table.replace([]), lambda: run_lock.check(run / "rounds/2")):
            with pytest.raises(RunLostError):
                destroy()
        run_lock.check(Folder(tmp_path.parent / f"{tmp_path.name} other"))
        assert own in claims(tmp_path)
        # Whatever else goes wrong because of it, this is what the caller hears.
        raise OSError("a file is gone")

    with pytest.raises(RunLostError, match="mia on faraway"), driving(tmp_path):
        work()


def test_a_lock_that_somebody_deleted_is_lost(tmp_path: Path) -> None:
    def work() -> None:
        for name in claims(tmp_path):
            Folder(tmp_path).delete(name)
        run_lock.check(Folder(tmp_path))

    with pytest.raises(RunLostError, match="is gone"), driving(tmp_path):
        work()


def test_a_claim_of_one_who_waits_takes_nothing_away(tmp_path: Path) -> None:
    with driving(tmp_path):
        Elsewhere(str(tmp_path), "00000002-" + "0" * 32, "waiting")
        run_lock.check(Folder(tmp_path))


def test_of_two_that_claim_at_once_one_gets_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither saw the other before it wrote its claim; each does after."""
    first = Elsewhere(uri, state="waiting")
    with first.living(), pytest.raises(RunInUseError), driving(uri):
        pass
    first.folder.delete(first.name)
    listed, answers = RunLock._names, [[]]
    monkeypatch.setattr(RunLock, "_names", lambda lock: answers.pop() if answers else listed(lock))
    last = Elsewhere(uri, "00000001-" + "f" * 32, state="waiting")

    def gives_up() -> None:
        with last.living():
            time.sleep(3 * BEAT_S)
        last.folder.delete(last.name)

    thread = threading.Thread(target=gives_up)
    thread.start()
    with driving(uri):
        assert not thread.is_alive() or last.name not in last.folder.files()
    thread.join()


def test_drivers_of_different_shards_work_at_one_time(uri: str) -> None:
    other = Elsewhere(uri, "00000001-2of4-" + "0" * 32)
    with other.living(), driving(uri, Shard(1, 4)), driving(uri, Shard(3, 4)), driving(uri, Shard(3, 4)):
        assert len(claims(uri)) == 3
    assert claims(uri) == [f"lock/{other.name}"]


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ("-3of8", Shard(3, 8), r"^shard 3/8 of \S+ is in use: by mia .* at once$"),
        ("-3of8", Shard(1, 4), r"^shard 3/8 of .*Shards that run at one time are of one number: of 8 here$"),
        ("-3of8", None, r"^shard 3/8 of \S+ is in use"),
        ("", Shard(3, 8), r"^\S+ is in use: by mia .* at once$"),
    ],
)
def test_a_driver_is_refused_what_overlaps_anothers(
    tmp_path: Path, theirs: str, ours: Shard | None, message: str
) -> None:
    other = Elsewhere(str(tmp_path), f"00000001{theirs}-" + "0" * 32)
    with other.living(), pytest.raises(RunInUseError, match=message), driving(tmp_path, ours):
        pass
    assert claims(tmp_path) == [f"lock/{other.name}"]


def test_a_whole_driver_takes_over_from_shards_that_are_dead(tmp_path: Path) -> None:
    for shard in ("1of2", "2of2"):
        Elsewhere(str(tmp_path), f"00000001-{shard}-" + "0" * 32)
    with driving(tmp_path):
        assert len(claims(tmp_path)) == 1


def test_a_shard_that_was_taken_over_is_lost_and_its_neighbour_is_not(tmp_path: Path) -> None:
    def work(taken: str) -> None:
        Elsewhere(str(tmp_path), f"00000002-{taken}-" + "0" * 32)
        run_lock.check(Folder(tmp_path))

    with pytest.raises(RunLostError, match="mia"), driving(tmp_path, Shard(1, 2)):
        work("1of2")
    Folder(tmp_path).delete(claims(tmp_path)[0])
    with pytest.raises(RunInUseError, match="deletes nothing"), driving(tmp_path, Shard(1, 2)):
        work("2of2")


def test_a_driver_of_a_shard_destroys_nothing(tmp_path: Path) -> None:
    table = RunDir(tmp_path).table("pairs")
    with driving(tmp_path, Shard(1, 2)):
        for destroy in (table.compact, lambda: table.replace([])):
            with pytest.raises(RunInUseError, match="a driver of shard 1/2 deletes nothing there"):
                destroy()


DRIVER = """
import sys, time
from vpo_ray import recipe
from vpo_ray.loop import opening
from vpo_ray.storage import run_lock
run_lock.BEAT_S, run_lock.STALE_S, run_lock.POLL_S = 0.1, 0.8, 0.02
try:
    with opening.opened(recipe.load("jobs/recipes/tiny.yaml", [f"out={sys.argv[1]}"])) as run:
        print("has it", flush=True)
        time.sleep(60)
except run_lock.RunLostError as error:
    print("lost", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A driver in a process of its own that has `tmp_path / "run"`."""
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "run")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "has it\n"
            yield process
        finally:
            process.kill()


def tiny(tmp_path: Path) -> list[str]:
    (tmp_path / "q.txt").write_text("a cat\n", "utf-8")
    return [
        "jobs/recipes/tiny.yaml",
        "--out",
        f"{tmp_path / 'run'}",
        "--set",
        f"queries.path={tmp_path}/q.txt",
    ]


WRITERS = ("run", "curate", "draft", "evolve", "sft", "generate", "sample", "judge", "render", "score",
           "pair", "dpo", "train", "evaluate")  # fmt: skip


def test_every_command_that_writes_is_refused_and_a_reader_is_not(
    driver: subprocess.Popen[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    before = RunDir(tmp_path / "run").read("recipe.yaml")
    monkeypatch.setattr("vpo_ray.plan.check_recipe", lambda recipe: None)
    monkeypatch.setattr("vpo_ray.stream.connection.connect", lambda verbose=False: None)
    for command in WRITERS:
        assert cli.main([command, *tiny(tmp_path), "--set", "limits.tries=5"]) == 3, command
        assert f"process {driver.pid}" in capsys.readouterr().err
    assert RunDir(tmp_path / "run").read("recipe.yaml") == before
    out = ["jobs/recipes/tiny.yaml", "--out", f"{tmp_path / 'run'}"]
    assert cli.main(["report", *out]) == 0, capsys.readouterr().err


def test_a_driver_that_was_killed_is_taken_over_at_once(
    driver: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "STALE_S", 1000)
    driver.kill()
    driver.wait()
    with driving(tmp_path / "run"):
        assert len(claims(tmp_path / "run")) == 1


def test_a_driver_that_is_stopped_gives_the_lock_back(driver: subprocess.Popen[str], tmp_path: Path) -> None:
    driver.terminate()
    assert driver.communicate(timeout=30)[0] == "stopped\n"
    assert claims(tmp_path / "run") == []


def test_a_driver_that_was_frozen_stops_when_it_thaws(driver: subprocess.Popen[str], tmp_path: Path) -> None:
    driver.send_signal(signal.SIGSTOP)
    with driving(tmp_path / "run"):
        driver.send_signal(signal.SIGCONT)
        assert driver.communicate(timeout=30)[0] == "lost\n"
        run_lock.check(Folder(tmp_path / "run"))
    assert claims(tmp_path / "run") == []
