"""A run directory and a video store on a real S3-compatible server, through `pyarrow.fs`."""

import gzip
import itertools
import pickle
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vpo_ray import cli
from vpo_ray.files.folder import Folder, StorageError, join
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Queries
from vpo_ray.records import Row
from vpo_ray.stages.curate import InputError, curate
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.sft_data import sft_rows
from vpo_ray.storage.tables import Table
from vpo_ray.storage.videos import VideoDamaged, VideoMissing, VideoStore

KEY, OTHER = "ab" + "0" * 30, "cd" + "0" * 30
TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
DATA = bytes(range(256)) * 8


@pytest.fixture
def server(s3_options: str) -> str:
    return s3_options


@pytest.fixture
def uri(server: str, request: pytest.FixtureRequest) -> str:
    """A folder of its own for each test."""
    return f"s3://videos/{abs(hash(request.node.name))}?{server}"


@pytest.fixture
def store(uri: str) -> VideoStore:
    return VideoStore(uri)


def put(folder: Folder, name: str, data: bytes) -> None:
    """What somebody else does to an object."""
    with folder.fs.open_output_stream(f"{folder.path}/{name}", compression=None) as stream:
        stream.write(data)


def candidate(name: str, error: str | None = None) -> Row:
    row = {"candidate_id": name, "query_id": "q", "query": "a cat", "k": 0, "seed": 0}
    return {**row, "error": error}


def test_options_stay_at_the_end_of_a_uri(uri: str) -> None:
    place, options = uri.split("?")
    assert join(uri, "a/b") == f"{place}/a/b?{options}"
    assert (RunDir(uri) / "a").uri == f"{place}/a?{options}"
    assert Folder(f"{place}/?{options}").uri == uri
    assert RunDir(uri).table("renders").path.endswith("/renders")
    assert VideoStore(uri).uri(KEY) == f"{place}/ab/{KEY}.mp4?{options}"
    # A local name may hold the sign.
    assert join("/a/b?c", "d") == "/a/b?c/d"


def test_a_password_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(StorageError, match="environment") as caught:
        Folder("s3://key:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)


def test_files(uri: str) -> None:
    folder = Folder(uri)
    assert folder.files() == []
    with pytest.raises(FileNotFoundError):
        folder.read("x")
    folder.write("deep/ü x.bin", DATA)
    assert (folder.read("deep/ü x.bin"), folder.files()) == (DATA, ["deep/ü x.bin"])
    assert folder.exists("deep/ü x.bin")
    folder.delete("deep/ü x.bin")
    folder.delete("deep/ü x.bin")
    assert folder.files() == []


def test_a_bucket_that_is_not_there_is_named(server: str) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        Folder(f"s3://nowhere/run?{server}").write("x", b"1")


def test_a_server_that_is_not_there_is_named(server: str) -> None:
    gone = "s3://videos/run?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(StorageError, match=r"s3://videos/run"):
        RunDir(f"{gone}&connect_timeout=1&request_timeout=1").table("renders").parts()


class Interrupted:
    """A filesystem of which writes are interrupted halfway. Closing the stream, as leaving a `with`
    block does, publishes what was sent until then."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def open_output_stream(self, path: str) -> Any:
        stream = self.fs.open_output_stream(path)

        class Half:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                stream.close()

            def write(self, data: bytes) -> None:
                stream.write(data[: len(data) // 2])
                raise KeyboardInterrupt

        return Half()


def interrupt(folder: Folder, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "fs", Interrupted(folder.fs))
        with pytest.raises(KeyboardInterrupt):
            folder.write(name, DATA)


def test_a_write_that_is_interrupted_publishes_nothing(uri: str) -> None:
    interrupt(Folder(uri), "x")
    assert Folder(uri).files() == []


def test_an_overwrite_that_is_interrupted_leaves_the_old_object(uri: str) -> None:
    folder = Folder(uri)
    folder.write("x", b"old")
    interrupt(folder, "x")
    assert (folder.files(), folder.read("x")) == (["x"], b"old")
    folder.write("x", DATA)
    assert (folder.files(), folder.read("x")) == (["x"], DATA)


def test_an_overwrite_that_cannot_be_finished_leaves_the_old_object(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(uri)
    folder.write("x", b"old")

    class Full(Interrupted):
        def open_output_stream(self, path: str) -> Any:
            return self.fs.open_output_stream(path)

        def copy_file(self, source: str, target: str) -> None:
            raise OSError("the service is out of order")

    monkeypatch.setattr(folder, "fs", Full(folder.fs))
    with pytest.raises(StorageError, match="out of order"):
        folder.write("x", DATA)
    assert (Folder(uri).files(), Folder(uri).read("x")) == (["x"], b"old")


class Meanwhile:
    """A filesystem on which something happens between opening an object and reading it, once."""

    def __init__(self, fs: Any, what: Callable[[], object]) -> None:
        self._fs, self._what = fs, [what]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def open_input_stream(self, path: str) -> Any:
        stream = self._fs.open_input_stream(path)
        if self._what:
            self._what.pop()()
        return stream


def test_an_object_that_goes_while_it_is_read_is_not_there(uri: str) -> None:
    folder = RunDir(uri)
    folder.write("x", b"1")
    folder.fs = Meanwhile(folder.fs, lambda: Folder(uri).delete("x"))
    with pytest.raises(FileNotFoundError):
        folder.read("x")


@pytest.mark.parametrize("new", [b"shorter", b"longer" * 100])
def test_an_object_that_is_replaced_while_it_is_read_is_the_new_one(uri: str, new: bytes) -> None:
    folder = RunDir(uri)
    folder.write("x", b"old" * 20)
    folder.fs = Meanwhile(folder.fs, lambda: Folder(uri).write("x", new))
    assert folder.read("x") == new


def test_a_large_object_is_replaced_whole(uri: str) -> None:
    """More than one part of an upload."""
    folder, data = Folder(uri), DATA * 3_000
    for part in (b"1", b"2"):
        folder.write("x", part + data)
        assert folder.read("x") == part + data
    assert folder.files() == ["x"]


def test_videos(store: VideoStore) -> None:
    assert not store.has(KEY)
    info = store.write(KEY, DATA, {"prompt": "a cat"})
    again: VideoStore = pickle.loads(pickle.dumps(store))
    assert (again.hit(KEY), again.read(KEY)) == (info, DATA)
    assert [(e.key, e.complete) for e in store.entries()] == [(KEY, True)]
    assert list(store.verify()) == []
    store.delete(KEY)
    assert list(store.entries()) == []
    with pytest.raises(VideoMissing):
        store.read(KEY)


@pytest.mark.parametrize("damage", [DATA[:-1], DATA[:-1] + b"x", b""])
def test_a_video_that_was_cut_short_or_changed_is_rendered_again(store: VideoStore, damage: bytes) -> None:
    store.write(KEY, DATA, {})
    # Object stores tell the time in seconds: a change in the same one shows by its length or its read.
    time.sleep(1.1 if len(damage) == len(DATA) else 0)
    put(store.folder, f"ab/{KEY}.mp4", damage)
    assert [key for key, _ in store.verify()] == [KEY]
    assert not store.has(KEY)
    with pytest.raises(VideoDamaged):
        store.read(KEY)
    with pytest.raises(VideoMissing):
        store.read(KEY)
    store.write(KEY, DATA, {})
    assert store.read(KEY) == DATA
    assert store.has(KEY)


def test_a_video_whose_sidecar_never_came_is_absent(store: VideoStore) -> None:
    put(store.folder, f"ab/{KEY}.mp4", DATA)
    assert not store.has(KEY)
    [(entry, problem)] = store.inspect()
    assert (entry.complete, "json" in (problem or "")) == (False, True)


def test_prune(store: VideoStore) -> None:
    store.write(KEY, DATA, {})
    store.write(OTHER, DATA, {})
    put(store.folder, f"ef/ef{KEY}.mp4", DATA)
    later = datetime.now(UTC) + timedelta(minutes=1)
    assert store.prune(later - timedelta(days=1), complete=True) == []
    assert [entry.key for entry in store.prune(later)] == [f"ef{KEY}"]
    assert [entry.key for entry in store.prune(later, {KEY}, complete=True)] == [OTHER]
    assert [entry.key for entry in store.entries()] == [KEY]


def test_a_table_grows_resumes_and_is_merged(uri: str) -> None:
    table = RunDir(uri).table("renders")
    assert (table.parts(), table.count()) == ([], 0)
    for number in range(5):
        table.append([candidate(f"{number}a", "boom"), candidate(f"{number}b")])
    first = table.parts()
    # A run that was killed and goes on writes some batches again, and they stay one part each.
    table.append([candidate("3b"), candidate("3a", "boom")])
    assert RunDir(uri).table("renders").parts() == first
    table.append([candidate("3a")])
    assert {r["candidate_id"]: r["error"] for r in table.rows()}["3a"] is None
    again: Table = pickle.loads(pickle.dumps(table))
    assert again.keys() == {f"{n}{x}" for n in range(5) for x in "ab"}
    assert table.compact(fewest=2, rows_per_part=100) == 6
    assert again.files() == again.parts()
    assert len(again.parts()) == 1
    assert Counter(r["candidate_id"] for r in again.rows()) == Counter(
        {f"{n}{x}": 1 for n in range(5) for x in "ab"}
    )
    assert table.replace([candidate("z")]) == 1
    assert again.keys() == {"z"}


def test_a_run_directory_without_a_query_in_its_uri(
    uri: str, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The endpoint may come from the environment too."""
    endpoint = server.partition("&")[0].partition("=")[2]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    run = RunDir(uri.partition("?")[0])
    run.write_json("ledger.json", {"stages": {}})
    assert RunDir(uri).read_json("ledger.json") == {"stages": {}}


def test_the_commands_without_an_engine(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Curate, resume, pair, report and the store's own command, all on the server."""
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "q.txt").write_text("a cat\n\na dog\n", "utf-8")
    tiny = [TINY, "--out", uri, "--set", f"queries.path={tmp_path / 'q.txt'}"]
    tiny += ["--set", "queries.splits={dpo: 1}", "--set", "pair.dominance=none"]
    for _ in range(2):
        assert cli.main(["curate", *tiny]) == 0, capsys.readouterr().err
    run = RunDir(uri)
    assert (run.table("queries").count(), run.table("dropped").count()) == (2, 1)
    store = VideoStore(run.at("videos"))
    for k, query in itertools.product((0, 1), run.table("queries").rows()):
        key = f"{query['query_id'][:8]}{k}"
        store.write(key, DATA, {"prompt": f"take {k}", "frames": 9, "width": 96, "height": 64})
        run.table("feedback").append(
            [
                {
                    **candidate(key),
                    "query_id": query["query_id"],
                    "query": query["query"],
                    "k": k,
                    "prompt": f"take {k}",
                    "verdict": "aligned",
                    "video_key": key,
                    "video_uri": store.uri(key),
                    "answers": [],
                    "dimensions": [],
                    "score": float(k),
                }
            ]
        )
    for command in ("pair", "report"):
        assert cli.main([command, *tiny]) == 0, capsys.readouterr().err
    assert run.table("pairs").count() == 2
    assert b"take 1" in run.read("report/index.html")
    assert cli.main(["videos", "verify", run.at("videos")]) == 0
    assert "4 videos read, 0 damaged" in capsys.readouterr().out
    assert (
        cli.main(["videos", "prune", run.at("videos"), "--keep", uri, "--older-than", "0m", "--delete"]) == 0
    )
    assert len(list(store.entries())) == 4


def test_queries_are_read_from_a_store(uri: str) -> None:
    folder = Folder(uri)
    folder.write("logs/q1.jsonl", b'{"query": "one"}\n{"query": "two"}\n')
    folder.write("logs/deep/q2.txt", b"three\none\n")
    for path, found in {
        "logs/q1.jsonl": ["one", "two"],
        "logs/*.jsonl": ["one", "two"],
        "logs": ["three", "one", "two"],
        "**/q*.*": ["three", "one", "two"],
    }.items():
        curated = curate(Queries(path=join(uri, path)))
        assert [text for part in curated.queries(10) for text in part["query"].to_pylist()] == found
    with pytest.raises(InputError, match=r"none\.txt.*: No such file"):
        curate(Queries(path=join(uri, "none.txt")))


def test_what_users_hand_in_may_lie_in_a_store(uri: str) -> None:
    folder = Folder(uri)
    put(folder, "sft/a.jsonl", b'{"query": "a", "prompt": "A cat."}\n')
    put(folder, "sft/b.csv.gz", gzip.compress(b"query,prompt\nb,A dog.\n"))
    put(folder, "prompt.txt", "\ufeffAsk\r\n{query}".encode())
    data = join(uri, "sft")
    assert [row["prompt"] for row in sft_rows(data)] == ["A cat.", "A dog."]
    assert [row["prompt"] for row in sft_rows(join(data, "a.jsonl"))] == ["A cat."]
    assert [row["prompt"] for row in sft_rows(join(data, "*.csv.gz"))] == ["A dog."]
    assert read_prompt(join(uri, "prompt.txt")) == "Ask\n{query}"
    with pytest.raises(InputError, match=r"sft.data s3://videos/.*none.jsonl: No such file"):
        list(sft_rows(join(data, "none.jsonl")))
