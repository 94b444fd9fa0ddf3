"""Image-to-video on tiny pipelines of the real classes: what they are given, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_video_models
import torch
from diffusers.utils import is_ftfy_available
from PIL import Image

from vpo_ray.engines.video import RenderError
from vpo_ray.engines.video.engine import VideoEngine
from vpo_ray.engines.video.model import VideoModelError
from vpo_ray.files.folder import StorageError
from vpo_ray.recipe import Render
from vpo_ray.records import FEEDBACK, Row, table
from vpo_ray.stages.render import Renderer
from vpo_ray.storage.images import ImageStore
from vpo_ray.storage.videos import video_key
from vpo_ray.world import tiny

pytestmark = pytest.mark.engine
MODELS: dict[str, tuple[Callable[[Path], None], tuple[int, int, int]]] = {
    "cogvideox": (tiny.make_image_video, (9, 32, 48)),
    "wan": (tiny_video_models.wan_i2v, (5, 16, 32)),
    "ltx": (tiny_video_models.ltx_i2v, (9, 32, 64)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    made = {name: tmp_path_factory.mktemp("models") / name for name in MODELS}
    for name, folder in made.items():
        MODELS[name][0](folder)
    return made


def settings_of(name: str, folders: dict[str, Path], **more: Any) -> Render:
    frames, height, width = MODELS[name][1]
    size: dict[str, Any] = {"frames": frames, "height": height, "width": width}
    return Render(model=str(folders[name]), dtype="float32", steps=2, **size, **more)


@pytest.mark.parametrize("name", MODELS)
def test_each_model_sees_the_image(name: str, folders: dict[str, Path]) -> None:
    settings = settings_of(name, folders, batch_size=2)
    if name == "wan" and not is_ftfy_available():
        with pytest.raises(VideoModelError, match="needs one more package: pip install ftfy"):
            VideoEngine(settings)
        pytest.skip("ftfy is not installed")
    engine = VideoEngine(settings)
    frames, height, width = MODELS[name][1]
    red, blue = (Image.new("RGB", (70, 50), colour) for colour in ("red", "blue"))
    engine.warm_up()
    one, two = engine.animate([red, blue], ["a cat", "a cat"], [1, 1])
    (again,) = engine.animate([blue], ["a cat"], [1])
    assert isinstance(one, np.ndarray), one
    assert isinstance(two, np.ndarray), two
    assert one.shape == (frames, height, width, 3)
    assert np.array_equal(two, again), "each image goes with its prompt"
    assert np.abs(one.astype(int) - two).mean() > 0.2
    (refused,) = engine.render(["a cat"], [1])
    assert isinstance(refused, RenderError)
    assert "the query has no image" in str(refused)


def test_the_middle_of_an_image_is_shown_in_the_videos_size(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VideoEngine(settings_of("cogvideox", folders))
    image = Image.new("RGB", (192, 64), "black")  # three times as wide as high, the video half as much
    image.paste("white", (48, 0, 144, 64))
    given: list[Image.Image] = []
    preprocess = engine.pipeline.video_processor.preprocess

    def seen(image: Image.Image, **size: Any) -> Any:
        given.append(image)
        return preprocess(image, **size)

    monkeypatch.setattr(engine.pipeline.video_processor, "preprocess", seen)
    engine.animate([image], ["a cat"], [1])
    assert given[0].size == (48, 32)
    assert np.asarray(given[0]).min() > 200, "black sides are cut off"


def candidate(image: str | None, **columns: Any) -> Row:
    row = {"candidate_id": "c", "query_id": "q", "query": "a query", "k": 0, "seed": 5, "image": image}
    return {**row, "prompt": "a cat", "verdict": "aligned", **columns}


def test_rows_are_rendered_with_their_image(folders: dict[str, Path], tmp_path: Path) -> None:
    images = ImageStore(tmp_path / "images")
    names = []
    for colour in ("red", "blue"):
        Image.new("RGB", (70, 50), colour).save(tmp_path / "image.png")
        names.append(images.put((tmp_path / "image.png").read_bytes()))
    settings = settings_of("cogvideox", folders, batch_size=4)
    renderer = Renderer(settings, str(tmp_path / "videos"), 7, images=images.folder.uri)
    rows = [candidate(names[0]), candidate(names[1]), candidate(None), candidate(names[0], candidate_id="d")]
    red, blue, none, same = renderer(rows)
    table([red, blue, none, same], FEEDBACK)
    assert red["video_key"] == same["video_key"] != blue["video_key"]
    assert renderer.rendered == 2
    assert renderer.store.info(red["video_key"])["image"] == names[0].removesuffix(".png")
    assert "the query has no image, and CogVideoXImageToVideoPipeline makes videos from" in none["error"]
    gone = Renderer(settings, str(tmp_path / "others"), 7, images=str(tmp_path / "elsewhere"))
    with pytest.raises(StorageError, match="cannot read the image"):
        gone([candidate(names[0])])
    assert not gone.store.folder.files(), "its lease is given back"


def test_a_model_of_texts_refuses_an_image(tiny_models: Path, tmp_path: Path) -> None:
    images = ImageStore(tmp_path / "images")
    Image.new("RGB", (70, 50), "red").save(tmp_path / "image.webp")
    name = images.put((tmp_path / "image.webp").read_bytes())
    size: dict[str, Any] = {"frames": 9, "height": 32, "width": 48}
    settings = Render(model=str(tiny_models / "video"), dtype="float32", steps=1, batch_size=2, **size)
    renderer = Renderer(settings, str(tmp_path / "videos"), 7, images=images.folder.uri)
    refused, good = renderer([candidate(name), candidate(None)])
    assert "the query has an image, and CogVideoXPipeline makes videos from text alone" in refused["error"]
    assert renderer.store.has(good["video_key"])


def test_keys_without_an_image_are_what_they_were() -> None:
    settings = Render(model="m")
    assert video_key(settings, "a cat", 1, "m") == video_key(settings, "a cat", 1, "m", None)
    assert video_key(settings, "a cat", 1, "m", "ab.png") != video_key(settings, "a cat", 1, "m", "cd.png")
    assert video_key(settings, "a cat", 1, "m", "ab.png") == video_key(settings, "a cat", 1, "m", "ab.webp")
