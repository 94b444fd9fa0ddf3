"""`vpo fetch` against a server that speaks a hub's API: sizes and licences first, once, resumed, checked."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import yaml
from hub_server import COMMIT, HubServer

from vpo_ray import cli
from vpo_ray.files.folder import StorageError
from vpo_ray.recipe import published
from vpo_ray.recipe.file import shipped_recipes
from vpo_ray.storage import hub as storage_hub
from vpo_ray.storage.hub import hub_model

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 40_000,
    "pytorch_model.bin": b"the same for others",
    "original/consolidated.00.pth": b"the same again",
    "model.fp16.safetensors": b"of another precision",
    "README.md": b"# It",
}
PIPELINE = {
    "model_index.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"w" * 5000,
    "transformer/config.json": b"[]",
    "all-in-one.safetensors": b"the same for others",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    server = HubServer()
    server.models = {"org/llm": MODEL, "org/video": PIPELINE}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Writes the recipe, with changes, and returns its path."""
    tree = yaml.safe_load(shipped_recipes()["tiny"].read_text("utf-8"))
    (tmp_path / "list.yaml").write_text("questions: []\n", "utf-8")
    (tmp_path / "q.txt").write_text("a\n", "utf-8")
    tree["queries"]["path"] = tree["sft"]["data"] = str(tmp_path / "q.txt")
    tree["policy"] = {"model": "org/llm"}
    tree["judge"] = {"model": "gpt-4o", "backend": "openai"}
    tree["render"] = {"model": "org/video"}
    tree["reward"] = {"model": "gpt-4o", "kind": "openai", "checklist": {"file": str(tmp_path / "list.yaml")}}

    def write(**changes: Any) -> str:
        made = {**tree, **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(made), "utf-8")
        return str(path)

    return write


def test_sizes_and_licences_come_first_and_list_downloads_nothing(
    hub: HubServer, written: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fetch", written(), "--list"]) == 0
    told = capsys.readouterr().out.splitlines()
    size = sum(len(MODEL[name]) for name in ("config.json", "model.safetensors", "README.md")) / 1e6
    assert told[0].startswith(f"policy.model: org/llm of the hub, {size:.2f} MB, licence: theirs, https://")
    assert told[1].startswith("render.model: org/video of the hub, 0.01 MB")
    assert not [path for _, path, _ in hub.asked if "/resolve/" in path]


def test_a_component_without_safetensors_comes_as_it_is(hub: HubServer) -> None:
    binary = {
        "text_encoder/config.json": b"{}",
        "text_encoder/pytorch_model.bin": b"weights",
        "text_encoder/pytorch_model.fp16.bin": b"of another precision",
        "transformer/diffusion_pytorch_model.bin": b"the same for others",
        "original/model.bin": b"the same again",
    }
    hub.models["org/mixed"] = PIPELINE | binary
    kept = {file.name for file in hub_model("org/mixed").files}
    assert kept == PIPELINE.keys() - {"all-in-one.safetensors"} | {
        "text_encoder/config.json",
        "text_encoder/pytorch_model.bin",
    }


def test_a_folder_gets_what_engines_read_and_the_rest_of_what_broke_off(
    hub: HubServer,
    written: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Less than this is not kept of what broke off.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.breaks = ["model.safetensors"]
    assert cli.main(["fetch", written(), "--to", str(tmp_path / "to")]) == 0
    folder = tmp_path / "to/models/org--llm"
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {name for name in files if not name.startswith(".cache")} == {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    _, rest = hub.downloads("model.safetensors")
    assert rest == f"bytes={len(MODEL['model.safetensors']) // 2}-", "it goes on where it broke off"
    assert (tmp_path / "to/models/org--video/transformer/config.json").is_file()
    assert not (tmp_path / "to/models/org--video/all-in-one.safetensors").exists()
    assert f"--set policy.model={folder}" in capsys.readouterr().out
    assert cli.main(["fetch", written(), "--to", str(tmp_path / "to")]) == 0
    assert len(hub.downloads("model.safetensors")) == 2, "once"


def test_a_file_that_is_not_what_the_hub_says_is_told_and_comes_anew(
    hub: HubServer, written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fetch", written(), "--to", str(tmp_path / "to")]
    assert cli.main(arguments) == 0
    weights = tmp_path / "to/models/org--llm/model.safetensors"
    times = weights.stat()
    damaged = bytearray(weights.read_bytes())
    damaged[7] ^= 1
    weights.write_bytes(damaged)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cli.main(arguments) == 1
    assert "model.safetensors has another hash" in capsys.readouterr().err
    assert (tmp_path / "to/models/org--video/model_index.json").is_file(), "the others do not wait"
    assert cli.main(arguments) == 0
    assert weights.read_bytes() == MODEL["model.safetensors"]


def test_without_a_folder_a_model_is_where_engines_find_it_by_its_id(
    hub: HubServer, written: Any, tmp_path: Path
) -> None:
    assert cli.main(["fetch", written()]) == 0
    snapshot = tmp_path / "cache/models--org--llm/snapshots" / COMMIT
    assert (snapshot / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert (tmp_path / "cache/models--org--llm/refs/main").read_text("utf-8") == COMMIT


def test_a_store_gets_it_once(
    hub: HubServer, written: Any, s3_options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    to = f"s3://videos/fetched?{s3_options}"
    assert cli.main(["fetch", written(), "--to", to]) == 0
    fs, path = pafs.FileSystem.from_uri(to)
    with fs.open_input_stream(f"{path}/models/org--llm/model.safetensors") as stream:
        assert stream.read() == MODEL["model.safetensors"]
    assert "--set policy.model=s3://videos/fetched/models/org--llm?" in capsys.readouterr().out
    before = len(hub.downloads("model.safetensors"))
    assert cli.main(["fetch", written(), "--to", to]) == 0
    assert len(hub.downloads("model.safetensors")) == before


def test_files_by_url_go_on_and_are_checked_by_their_hash(
    hub: HubServer, written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = b"query,prompt\n" + b"a,b\n" * 90_000
    hub.files = {"data/sft.csv": data}
    known = hashlib.sha256(data).hexdigest()
    url = f"{hub.url}/data/sft.csv"

    def fetch(name: str) -> tuple[int, str]:
        recipe = written(sft={"data": name, "epochs": 1, "lr": 1e-4, "global_batch": 8})
        status = cli.main(["fetch", recipe, "--to", str(tmp_path / "to")])
        told = capsys.readouterr()
        return status, told.out + told.err

    status, told = fetch(url)
    assert status == 1
    assert "http without a hash" in told
    hub.breaks = ["data/sft.csv"]
    status, told = fetch(f"{url}#sha256={known}")
    assert status == 1
    assert "the same command goes on" in told
    status, told = fetch(f"{url}#sha256={known}")
    assert status == 0, told
    assert hub.downloads("sft.csv")[-1] == f"bytes={len(data) // 2}-"
    (made,) = (tmp_path / "to/files").glob("*/sft.csv")
    assert made.read_bytes() == data
    assert f"--set sft.data={made}" in told
    assert fetch(f"{url}#sha256={known.upper()}")[0] == 0
    assert len(hub.downloads("sft.csv")) == 2
    status, told = fetch(f"{url}#sha256={'0' * 64}")
    assert status == 1
    assert f"has SHA-256 {known}" in told


@pytest.mark.parametrize(
    ("tags", "changes", "second"),
    [(True, False, "bytes=500-"), (True, True, "bytes=500-"), (False, True, None)],
)
def test_without_a_hash_a_download_goes_on_only_in_the_version_that_it_began(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tags: bool,
    changes: bool,
    second: str | None,
) -> None:
    """A file that changed meanwhile must not be half the one and half the other."""
    ask = storage_hub._request
    # The server has no certificate.
    monkeypatch.setattr(storage_hub, "_request", lambda url, *more: ask(url.replace("https", "http"), *more))
    hub.tags, hub.breaks, hub.files = tags, ["sft.csv"], {"sft.csv": b"a" * 1000}
    url, target = f"{hub.url.replace('http', 'https')}/sft.csv", tmp_path / "sft.csv"
    with pytest.raises(StorageError, match="the same command goes on"):
        storage_hub.download_file(url, target)
    if changes:
        hub.files = {"sft.csv": b"b" * 900}
    storage_hub.download_file(url, target)
    assert target.read_bytes() == hub.files["sft.csv"]
    assert hub.downloads("sft.csv") == [None, second]
    assert [path.name for path in tmp_path.iterdir()] == ["sft.csv"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.csv", "HTTP://127.0.0.1:9/a.csv"])
def test_http_without_a_hash_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="http without a hash can be anything"):
        storage_hub.download_file(url, tmp_path / "a.csv")


def test_two_revisions_of_a_model_go_to_two_folders(
    hub: HubServer, written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(judge={"model": "org/llm", "revision": "v2"})
    assert cli.main(["fetch", recipe, "--to", str(tmp_path / "to")]) == 0
    told = capsys.readouterr().out
    for key, name in (("policy.model", "org--llm"), ("judge.model", "org--llm@v2")):
        assert f"--set {key}={tmp_path}/to/models/{name}\n" in told
        assert (tmp_path / "to/models" / name / "config.json").is_file()


def test_files_of_one_name_at_two_urls_are_two(
    hub: HubServer, written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = {"a/data.csv": b"query\na\n", "b/data.csv": b"query,prompt\na,b\n"}
    hub.only_get = True
    urls = [f"{hub.url}/{name}#sha256={hashlib.sha256(data).hexdigest()}" for name, data in hub.files.items()]
    recipe = written(
        queries={"path": urls[0], "splits": {"sft": 1}},
        sft={"data": urls[1], "epochs": 1, "lr": 1e-4, "global_batch": 8},
    )
    assert cli.main(["fetch", recipe, "--to", str(tmp_path / "to")]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    for key, data in zip(("queries.path", "sft.data"), hub.files.values(), strict=True):
        (path,) = (line.partition("=")[2] for line in told.splitlines() if f"--set {key}=" in line)
        assert Path(path).read_bytes() == data


def test_published_files_go_where_the_recipe_looks_for_them(
    hub: HubServer, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VisionReward's files: the weights of all questions are made of those of the selected ones."""
    hub.models["zai-org/VisionReward-Video"] = MODEL
    texts = {"VisionReward_video_qa.txt": b"One?\nTwo?\nThree?\n", "weight.json": b"[0.5, 0.25]",
             "VisionReward_video_qa_select.txt": b"Three?\nOne?\n"}  # fmt: skip
    hub.files = texts
    entries = {name: dict(entry) for name, entry in published.published_files().items()}
    for name, data in texts.items():
        entries[name] |= {"url": f"{hub.url}/{name}", "sha256": hashlib.sha256(data).hexdigest()}
    monkeypatch.setattr(published, "published_files", lambda: entries)
    folder = tmp_path / "mnt"
    checklist = {
        "questions": f"{folder}/q/VisionReward_video_qa.txt",
        "weights": f"{folder}/q/weight_64.json",
    }
    reward = {"model": f"{folder}/VisionReward-Video", "checklist": checklist}
    assert cli.main(["fetch", written(reward=reward)]) == 0
    assert json.loads((folder / "q/weight_64.json").read_text("utf-8")) == [0.25, 0, 0.5]
    assert (folder / "q/VisionReward_video_qa.txt").read_bytes() == texts["VisionReward_video_qa.txt"]
    assert (folder / "VisionReward-Video/model.safetensors").is_file()


def test_what_the_hub_refuses_is_told_with_what_to_do(
    hub: HubServer, written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.gated = {"org/llm"}
    hub.models["org/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    arguments = ["--to", str(tmp_path / "to")]
    recipe = written(judge={"model": "org/none"}, render={"model": "org/pickled"})
    assert cli.main(["fetch", recipe, *arguments]) == 1
    err = capsys.readouterr().err
    assert "policy.model: org/llm is gated: accept its licence at" in err
    assert "judge.model: org/none: no such model at" in err
    assert "render.model: org/pickled: the hub has no *.safetensors of it" in err


def test_the_catalogues_models_are_those_of_presets_and_hashes_are_whole() -> None:
    from vpo_ray.recipe import video_presets

    models = published.published_models()
    assert {preset["settings"]["model"] for preset in video_presets().values()} <= models.keys()
    for entry in published.published_files().values():
        assert len({"model", "url", "made_of"} & entry.keys()) == 1
        assert len(entry.get("sha256", "0" * 64)) == 64
        assert {*entry.get("made_of", ())} <= published.published_files().keys()
    assert hub_model.__doc__
