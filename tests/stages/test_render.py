"""The render stage on the tiny CogVideoX pipeline: what is rendered, stored, reused and refused."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from vpo_ray.engines.video.engine import VideoEngine, probe_video
from vpo_ray.engines.video.model import VideoModelError
from vpo_ray.files.folder import StorageError
from vpo_ray.recipe import Render
from vpo_ray.records import FEEDBACK, Row, seed_of, table
from vpo_ray.stages.render import Renderer, wants
from vpo_ray.storage import tables as storage
from vpo_ray.storage import video_leases

pytestmark = pytest.mark.engine


@pytest.fixture
def settings(tiny_models: Path) -> Render:
    size = {"frames": 9, "height": 32, "width": 48}
    return Render(model=str(tiny_models / "video"), dtype="float32", steps=1, batch_size=2, **size)


def candidate(prompt: str | None, query: str = "q", **columns: Any) -> Row:
    row = {"candidate_id": f"{query}-{prompt}", "query_id": query, "query": "a query", "k": 0, "seed": 5}
    return {**row, "prompt": prompt, "verdict": "aligned", **columns}


def test_only_aligned_prompts_without_an_error_are_rendered(settings: Render, tmp_path: Path) -> None:
    rows = [
        candidate("unsafe", verdict="unsafe"),
        candidate(None),
        candidate("failed", error="broken", error_stage="sample"),
        candidate("unjudged", verdict=None),
        candidate("good"),
    ]
    assert [wants(row) for row in rows] == [False, False, False, False, True]
    renderer = Renderer(settings, str(tmp_path), 7)
    done = renderer(rows)
    assert done[:4] == rows[:4]
    assert done[4]["video_key"]
    assert renderer.rendered == 1


def test_rows_get_their_video(settings: Render, tmp_path: Path) -> None:
    renderer = Renderer(settings, str(tmp_path), 7)
    rows = [candidate("a cat"), candidate("a dog"), candidate("a cat"), candidate("a cat", query="p")]
    done = renderer(rows)
    table(done, FEEDBACK)
    assert [row["video_seed"] for row in done] == [seed_of("video", 7, q) for q in "qqqp"]
    # One prompt of one query is one video, whoever asks; another query has another seed.
    cat, dog, twin, other = (row["video_key"] for row in done)
    assert cat == twin
    assert len({cat, dog, other}) == 3
    assert (renderer.rendered, renderer.hits) == (3, 1)
    for row in done:
        data = renderer.store.read(row["video_key"])
        assert Path(row["video_uri"]).read_bytes() == data
        assert (
            probe_video(data) == (row["frames"], row["fps"], row["width"], row["height"]) == (9, 8.0, 48, 32)
        )
    assert all(row["text_cut"] == 0 for row in done)
    info = renderer.store.info(cat)
    assert (info["prompt"], info["seed"], info["settings"]["steps"]) == ("a cat", done[0]["video_seed"], 1)


def test_what_the_text_encoder_did_not_take_of_a_prompt_is_told(settings: Render, tmp_path: Path) -> None:
    long = candidate("word " * 400)
    rendered = Renderer(settings, str(tmp_path), 7)([long, candidate("a cat")])
    assert rendered[0]["text_cut"] > 100
    assert rendered[1]["text_cut"] == 0
    found = Renderer(settings, str(tmp_path), 7)([long])
    assert found[0]["text_cut"] == rendered[0]["text_cut"], "also of a video that is in the store"


def test_a_second_run_renders_nothing_and_loads_nothing(settings: Render, tmp_path: Path) -> None:
    rows = [candidate("a cat"), candidate("a dog")]
    first = Renderer(settings, str(tmp_path), 7)(rows)
    again = Renderer(settings.model_copy(update={"batch_size": 1}), str(tmp_path), 7)
    assert again(rows) == first
    assert (again.rendered, again.hits) == (0, 2)
    assert again._engine is None


def test_a_damaged_video_is_rendered_again(settings: Render, tmp_path: Path) -> None:
    renderer = Renderer(settings, str(tmp_path), 7)
    (row,) = renderer([candidate("a cat")])
    file = Path(row["video_uri"])
    good = file.read_bytes()
    for bad in (good[:-10], good[:-1] + b"\x00" if good[-1:] != b"\x00" else good[:-1] + b"\x01"):
        file.write_bytes(bad)
        os.utime(file, (0, 0))  # within one tick of the clock an edit may go unseen
        assert renderer([candidate("a cat")]) == [row]
        assert file.read_bytes() == good
    assert renderer.rendered == 3


def test_batches_make_the_same_videos(settings: Render, tmp_path: Path) -> None:
    rows = [candidate(prompt) for prompt in ("a cat", "a dog", "rain", "a street at night", "fire")]
    keys = []
    for size in (1, 5):
        batch = settings.model_copy(update={"batch_size": size})
        keys.append([row["video_key"] for row in Renderer(batch, str(tmp_path / str(size)), 7)(rows)])
    assert keys[0] == keys[1]


def test_a_row_that_cannot_be_rendered_carries_the_reason(settings: Render, tmp_path: Path) -> None:
    renderer = Renderer(settings, str(tmp_path), 7)
    renderer([candidate("warm up")])
    assert renderer._engine is not None
    pipeline = renderer._engine.pipeline
    poison = pipeline.tokenizer("Q").input_ids[-2]
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[poison] = float("nan")
    bad, blank, good = renderer([candidate("Q"), candidate("  "), candidate("a cat")])
    assert (bad["error_stage"], blank["error_stage"], good.get("error_stage")) == ("render", "render", None)
    assert "NaN" in bad["error"]
    assert "empty" in blank["error"]
    assert "video_key" not in bad
    assert renderer.store.has(good["video_key"])
    table([bad, blank, good], FEEDBACK)


def test_a_slow_render_is_an_error_row(settings: Render, tmp_path: Path) -> None:
    slow = Renderer(settings.model_copy(update={"time_limit_s": 1e-6}), str(tmp_path), 7)
    (row,) = slow([candidate("a cat")])
    assert "time_limit_s" in row["error"]


def test_a_store_that_cannot_be_written_stops_the_run(settings: Render, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    with pytest.raises(StorageError, match="file/videos"):
        Renderer(settings, str(tmp_path / "file" / "videos"), 7)([candidate("a cat")])


def test_a_store_that_fills_up_stops_the_run_which_then_resumes(
    settings: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [candidate(f"prompt {i}") for i in range(6)]
    renderer = Renderer(settings, str(tmp_path), 7)
    write = storage.Folder.write

    def full_after_two(folder: storage.Folder, name: str, data: bytes) -> None:
        if renderer.rendered >= 2:
            raise StorageError(f"cannot write {name}: no space left on device")
        write(folder, name, data)

    monkeypatch.setattr(storage.Folder, "write", full_after_two)
    with pytest.raises(StorageError, match="no space left"):
        renderer(rows)
    renderer._writer.shutdown()
    monkeypatch.undo()
    assert list(renderer.store.verify()) == []
    resumed = Renderer(settings, str(tmp_path), 7)
    assert all(row["video_key"] for row in resumed(rows))
    assert (resumed.hits, resumed.rendered) == (2, 4)


def test_threads_share_one_device_and_render_nothing_twice(settings: Render, tmp_path: Path) -> None:
    renderer = Renderer(settings, str(tmp_path), 7)
    blocks = [[candidate("shared"), candidate(f"own {n}")] for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(renderer, blocks))
    assert all(renderer.store.has(row["video_key"]) for rows in done for row in rows)
    assert renderer.rendered == 5


def test_renderers_of_one_store_render_nothing_twice(settings: Render, tmp_path: Path) -> None:
    """As replicas of a pool, shards of a run or an endpoint and a run do."""
    settings = settings.model_copy(update={"batch_size": 1})
    renderers = [Renderer(settings, str(tmp_path), 7) for _ in range(3)]
    for renderer in renderers[1:]:
        renderer._engine = VideoEngine(settings)  # all are ready at the same moment
    rows = [candidate("shared"), candidate("also shared")]
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda renderer: renderer([candidate("own"), *rows]), renderers))
    assert done[0] == done[1] == done[2]
    assert sum(renderer.rendered for renderer in renderers) == 3
    assert [r.rendered + r.hits for r in renderers] == [3, 3, 3]
    assert len(renderers[0].store.folder.files()) == 6, "no lease is left"


def test_a_video_that_a_dead_renderer_wanted_to_make_is_made(
    settings: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_leases, "STALE_S", 0.5)
    renderer = Renderer(settings, str(tmp_path), 7)
    key = renderer._job(candidate("a cat")).key
    renderer.store.folder.write_json(f"leases/{key}-{'0' * 32}.json", {"host": "faraway", "beats": 3})
    (row,) = renderer([candidate("a cat")])
    assert (row["video_key"], renderer.rendered) == (key, 1)


def test_a_render_that_fails_gives_its_lease_back(
    settings: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer(settings, str(tmp_path), 7)

    def fails(*_: Any) -> None:
        raise VideoModelError("no such scheduler")

    with monkeypatch.context() as patch:
        patch.setattr(Renderer, "_videos", fails)
        with pytest.raises(VideoModelError):
            renderer([candidate("a cat"), candidate("a dog")])
    assert renderer.store.folder.files() == []


def test_a_sidecar_of_somebody_else_is_no_hit(settings: Render, tmp_path: Path) -> None:
    renderer = Renderer(settings, str(tmp_path), 7)
    renderer.store.write(renderer._job(candidate("a cat")).key, b"an mp4", {})
    (row,) = renderer([candidate("a cat")])
    assert (row["frames"], renderer.rendered) == (9, 1)


def test_a_lost_device_ends_the_process(
    settings: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer(settings, str(tmp_path), 7)
    renderer([candidate("warm up")])
    assert renderer._engine is not None

    def lose(module: Any, args: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    renderer._engine.pipeline.text_encoder.register_forward_pre_hook(lose)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        renderer([candidate("a cat")])


def test_a_render_that_hangs_within_a_step_ends_its_process(settings: Render, tmp_path: Path) -> None:
    # The step callback of the time limit is never reached; the pool takes the row to a new process.
    code = f"""
import time
from vpo_ray.recipe import Render
from vpo_ray.stages import render
render.GRACE_S = 0.5
settings = Render(**{settings.model_dump()})
renderer = render.Renderer(settings, {str(tmp_path)!r}, 7)
row = {{"query_id": "q", "prompt": "a cat", "verdict": "aligned"}}
renderer([row])
renderer._engine.pipeline.text_encoder.register_forward_pre_hook(lambda *_: time.sleep(60))
renderer.settings = settings.model_copy(update={{"time_limit_s": 0.1}})
print("hanging", flush=True)
renderer([row | {{"prompt": "a dog"}}])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.stdout == "hanging\n", ran.stderr
    assert ran.returncode == 1
    assert "Timeout" in ran.stderr
    assert "in render" in ran.stderr, "the place where it hangs is told"


def test_a_model_that_is_not_there_is_refused_at_once(settings: Render, tmp_path: Path) -> None:
    with pytest.raises(VideoModelError, match="runs/tiny/absent"):
        Renderer(settings.model_copy(update={"model": "runs/tiny/absent"}), str(tmp_path), 7)
