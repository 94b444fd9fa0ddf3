"""The video engine on the tiny CogVideoX pipeline, and the mp4 codec."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from vpo_ray.engines.video import RenderError
from vpo_ray.engines.video.engine import RenderTimeout, VideoEngine, VideoInfo, encode, probe_video
from vpo_ray.engines.video.model import VideoModelError
from vpo_ray.engines.video.weights import model_identity
from vpo_ray.recipe import Render

PROMPTS = ["a cat", "a dog runs along a beach at night", "red " * 40, "rain on a window"]
SEEDS = [1, 2, 3, 4]


@pytest.fixture
def settings(tiny_models: Path) -> dict[str, Any]:
    size = {"frames": 9, "height": 32, "width": 48}
    return {"model": str(tiny_models / "video"), "dtype": "float32", "steps": 2, **size}


@pytest.fixture
def changed_model(tiny_models: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_models / "video", tmp_path / "video"))


def rgb(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.engine
def test_batch_size_changes_no_pixel_by_more_than_rounding(settings: dict[str, Any]) -> None:
    # In float32 the sums of a larger batch are made in another order: one level of 255 at most.
    alone = VideoEngine(Render(**settings, batch_size=1)).render(PROMPTS, SEEDS)
    together = VideoEngine(Render(**settings, batch_size=4)).render(PROMPTS, SEEDS)
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, np.ndarray)
        assert one.shape == (9, 32, 48, 3)
        assert one.dtype == np.uint8
        assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.engine
def test_seed_and_prompt_decide_the_frames(settings: dict[str, Any]) -> None:
    engine = VideoEngine(Render(**settings, batch_size=4))
    first, seed, prompt, again = engine.render(["a cat", "a cat", "a dog", "a cat"], [1, 2, 1, 1])
    assert np.abs(first.astype(int) - again).max() <= 1
    assert np.abs(first.astype(int) - seed).max() > 20
    assert np.abs(first.astype(int) - prompt).max() > 1


@pytest.mark.engine
def test_empty_and_endless_prompts(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    engine = VideoEngine(Render(**settings))
    empty, endless, normal = engine.render(["  \n", "word " * 5000, "a cat"], [1, 2, 3])
    assert isinstance(empty, RenderError)
    assert "empty" in str(empty)
    assert isinstance(endless, np.ndarray)
    assert isinstance(normal, np.ndarray)
    assert engine.truncated == 1
    assert engine.cut("a cat") == 0
    assert engine.cut("word " * 5000) > 4000
    assert "takes 226" in caplog.text


@pytest.mark.engine
def test_one_failing_prompt_leaves_the_rest_of_its_batch(settings: dict[str, Any]) -> None:
    engine = VideoEngine(Render(**settings, batch_size=4))
    poison = engine.pipeline.tokenizer("Q").input_ids[-2]
    with torch.no_grad():
        engine.pipeline.text_encoder.get_input_embeddings().weight[poison] = float("nan")
    good, nan, other = engine.render(["a cat", "Q", "a dog"], [1, 2, 3])
    assert isinstance(good, np.ndarray)
    assert isinstance(other, np.ndarray)
    assert "NaN" in str(nan)

    def refuse(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if poison in args[0]:
            raise RuntimeError("this text is refused")

    engine.pipeline.text_encoder.register_forward_pre_hook(refuse)
    good, refused, other = engine.render(["a cat", "Q", "a dog"], [1, 2, 3])
    assert isinstance(good, np.ndarray)
    assert isinstance(other, np.ndarray)
    assert "this text is refused" in str(refused)


@pytest.mark.engine
def test_out_of_memory_falls_back_to_smaller_batches(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = VideoEngine(Render(**settings, batch_size=4))
    room = 2

    def fill(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        if len(kwargs["hidden_states"]) > 2 * room:  # guidance renders each video twice
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine.pipeline.transformer.register_forward_pre_hook(fill, with_kwargs=True)
    videos = engine.render(PROMPTS, SEEDS)
    assert all(isinstance(video, np.ndarray) for video in videos)
    assert engine.batch_size == 2
    assert "out of memory with 4 videos at once; going on with 2" in caplog.text
    room = 0
    assert all("out of memory for one video" in str(video) for video in engine.render(PROMPTS, SEEDS))


@pytest.mark.engine
def test_black_frames_are_an_error(settings: dict[str, Any]) -> None:
    engine = VideoEngine(Render(**settings))
    engine.pipeline.vae.decoder.conv_out.register_forward_hook(
        lambda module, args, output: (torch.full_like(output[0], -1.0), output[1])
    )
    (video,) = engine.render(["a cat"], [1])
    assert "black" in str(video)


@pytest.mark.engine
def test_time_limit_ends_a_render_and_the_engine_goes_on(settings: dict[str, Any]) -> None:
    engine = VideoEngine(Render(**settings, time_limit_s=1e-6))
    (video,) = engine.render(["a cat"], [1])
    assert isinstance(video, RenderTimeout)
    assert "time_limit_s" in str(video)
    engine.settings = Render(**settings)
    assert isinstance(engine.render(["a cat"], [1])[0], np.ndarray)


@pytest.mark.engine
def test_warming_up_is_short_and_leaves_no_trace(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings |= {"steps": 6, "batch_size": 2, "time_limit_s": 60}
    plain = VideoEngine(Render(**settings)).render(["a dog"], [1])[0]
    engine = VideoEngine(Render(**settings))
    calls: list[int] = []
    engine.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    engine.warm_up()
    assert calls == [4, 4], "two steps, of the whole batch with and without guidance"
    assert np.array_equal(engine.render(["a dog"], [1])[0], plain)
    assert len(calls) == 2 + 6

    engine.settings = Render(**(settings | {"time_limit_s": 1e-6}))
    engine.warm_up()
    assert not caplog.records, "compiling may take longer than a video"
    engine.pipeline.text_encoder.register_forward_pre_hook(lambda module, args: 1 / 0)
    engine.warm_up()
    assert "the warm-up render failed: ZeroDivisionError" in caplog.text


@pytest.mark.engine
def test_scheduler_and_vae_options_are_applied(settings: dict[str, Any]) -> None:
    settings |= {"scheduler": "CogVideoXDPMScheduler", "dtype": "bfloat16"}
    engine = VideoEngine(Render(**settings, vae_tiling=True, vae_slicing=True))
    assert type(engine.pipeline.scheduler).__name__ == "CogVideoXDPMScheduler"
    assert engine.pipeline.vae.use_tiling
    assert engine.pipeline.vae.use_slicing
    assert engine.pipeline.transformer.dtype == torch.bfloat16
    assert isinstance(engine.render(["a cat"], [1])[0], np.ndarray)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 10}, "8k+1 frames, such as 9 or 17"),
        ({"frames": 13}, "8k+1 frames, such as 9 or 17"),  # an even number of latent frames
        ({"height": 40}, "multiples of 16, such as 32 or 48"),
        ({"width": 4}, "multiples of 16, such as 16 or 32"),
        ({"scheduler": "BestScheduler"}, "diffusers has no BestScheduler"),
        ({"scheduler": "CogVideoXPipeline"}, "diffusers has no CogVideoXPipeline"),
        ({"max_text_tokens": 500}, "takes 226"),
        ({"model": "no/such/folder"}, "no diffusers pipeline"),
    ],
)
def test_settings_that_the_model_cannot_take_are_refused(
    settings: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(VideoModelError, match=r"render\.") as refusal:
        VideoEngine(Render(**(settings | changes)))
    assert says in str(refusal.value)


@pytest.mark.engine
def test_any_accepted_number_of_frames_is_what_comes_back(settings: dict[str, Any]) -> None:
    for frames in (1, 17):
        (video,) = VideoEngine(Render(**(settings | {"frames": frames}))).render(["a cat"], [1])
        assert isinstance(video, np.ndarray)
        assert len(video) == frames


def _without_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def _without_weights(folder: Path) -> None:
    next((folder / "transformer").glob("*.safetensors")).unlink()


def _with_weights_cut_short(folder: Path) -> None:
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])


def _of_class(name: str) -> Any:
    def change(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}), "utf-8")

    return change


def _without_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _with_broken_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{", "utf-8")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without_component, "lacks the component vae"),
        (_without_weights, "cannot be loaded"),
        (_with_weights_cut_short, "cannot be loaded"),
        (
            _of_class("StableVideoDiffusionPipeline"),
            "it needs an input image",
        ),
        (_of_class("StableDiffusionPipeline"), "not a text- or image-to-video pipeline"),
        (_of_class("NoSuchPipeline"), "NoSuchPipeline, which diffusers"),
        (_of_class("TextToVideoZeroPipeline"), "render.max_text_tokens"),
        (_without_index, "no diffusers pipeline"),
        (_with_broken_index, "no diffusers pipeline"),
    ],
)
def test_a_folder_that_cannot_render_is_refused(
    changed_model: Path, settings: dict[str, Any], damage: Any, says: str
) -> None:
    damage(changed_model)
    with pytest.raises(VideoModelError) as refusal:
        VideoEngine(Render(**(settings | {"model": str(changed_model), "max_text_tokens": 226})))
    assert says in str(refusal.value)
    assert str(changed_model) in str(refusal.value) or "max_text_tokens" in says


def test_a_model_is_known_by_its_files(tiny_models: Path, changed_model: Path) -> None:
    same = model_identity(str(tiny_models / "video"), None)
    assert model_identity(str(changed_model), None) == same
    weights = changed_model / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_identity(str(changed_model), None) != same
    with pytest.raises(VideoModelError, match="no folder here"):
        model_identity("runs/no/such/model", None)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """Soft colours that move: (9, 48, 64, 3)."""
    t, y, x = np.mgrid[0:9, 0:48, 0:64]
    waves = [np.sin((x + 3 * t) / 9), np.cos((y - 2 * t) / 7), np.sin((x + y + t) / 11)]
    return np.stack([127 + 80 * wave for wave in waves], axis=-1).astype(np.uint8)


def test_encoding_keeps_frames_and_colours(clip: np.ndarray) -> None:
    data = encode(clip, 8, 17)
    assert probe_video(data) == VideoInfo(9, 8.0, 64, 48)
    assert encode(clip, 8, 17) == data
    assert np.abs(rgb(data).astype(int) - clip).mean() < 4
    with av.open(io.BytesIO(data)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")


def test_crf_trades_size_for_quality_and_0_is_lossless(clip: np.ndarray) -> None:
    best, good, bad = (encode(clip, 8, crf) for crf in (0, 17, 40))
    assert len(best) > len(good) > len(bad)
    yuv = [av.VideoFrame.from_ndarray(f, format="rgb24").to_ndarray(format="yuv420p") for f in clip]
    with av.open(io.BytesIO(best)) as container:
        decoded = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
    assert np.array_equal(yuv, decoded)


def test_odd_sizes_grow_to_even_ones(clip: np.ndarray) -> None:
    assert probe_video(encode(clip[:, :47, :63], 8, 17)) == VideoInfo(9, 8.0, 64, 48)
    assert probe_video(encode(clip[:1], 29.97, 17)) == VideoInfo(1, pytest.approx(29.97, abs=1e-3), 64, 48)


def test_the_same_frames_give_the_same_bytes_whatever_was_in_memory() -> None:
    random = np.random.default_rng(1)
    still = random.integers(0, 256, (18, 24, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    moving = np.stack([np.roll(still, (2 * at, 3 * at), (0, 1))[:128, :192] for at in range(17)])
    made = set()
    for _ in range(12):
        left = [np.full(random.integers(100, 300_000), random.integers(256), np.uint8) for _ in range(30)]
        del left
        made.add(encode(moving, 8, 17))
    assert len(made) == 1


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4)), np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3))]
)
def test_encoding_refuses_other_arrays(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(T, H, W, 3\)"):
        encode(frames, 8, 17)


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
        ("webm", "libvpx-vp9", {}),
    ],
)
def test_a_video_need_not_tell_how_many_frames_it_has(
    kind: str, codec: str, options: dict[str, str], clip: np.ndarray
) -> None:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = buffer.getvalue()
    assert probe_video(data) == VideoInfo(9, 8.0, 64, 48)
    if kind == "mp4":
        for bad in (data[:-300], data[: len(data) // 2]):
            with pytest.raises(ValueError, match="video"):
                probe_video(bad)


def test_probe_refuses_what_is_no_whole_video(clip: np.ndarray) -> None:
    data = encode(clip, 8, 17)
    for bad in (b"", b"text", data[:-200], data[: len(data) // 2], data[100:]):
        with pytest.raises(ValueError, match="video"):
            probe_video(bad)


def test_engine_module_imports_without_heavy_libraries() -> None:
    code = (
        "import sys, vpo_ray.stages.render; print({'torch', 'diffusers', 'ray', 'av'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
