"""The published video models: a tiny pipeline of each one's real classes, and its preset."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_video_models import MODELS, make_tiny, tiny_settings

from vpo_ray.engines.video.engine import VideoEngine
from vpo_ray.engines.video.model import VideoModelError, call_arguments
from vpo_ray.recipe import Render, video_presets

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny(name, tmp_path_factory.mktemp("models") / name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_each_model_renders_with_its_preset(name: str, folders: dict[str, Path]) -> None:
    settings = tiny_settings(name, folders[name])
    alone = VideoEngine(Render(**settings)).render(["a cat", "a dog"], [1, 2])
    together = VideoEngine(Render(**settings, batch_size=2)).render(["a cat", "a dog"], [1, 2])
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, np.ndarray), one
        assert isinstance(other, np.ndarray), other
        assert one.shape == (*MODELS[name][1], 3)
        assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.parametrize("name", MODELS)
def test_each_model_says_its_rule(name: str, folders: dict[str, Path]) -> None:
    settings = tiny_settings(name, folders[name])
    frames, _, width = MODELS[name][2]
    with pytest.raises(VideoModelError, match=r"takes \d+k\+1 frames, such as \d+ or \d+"):
        VideoEngine(Render(**(settings | {"frames": frames})))
    with pytest.raises(VideoModelError, match=r"render.width=\d+: \w+ takes multiples of (16|32), such as"):
        VideoEngine(Render(**(settings | {"width": width})))


@pytest.mark.parametrize("name", video_presets())
def test_presets_are_valid_and_say_where_they_are_from(name: str) -> None:
    preset = video_presets()[name]
    settings = Render(preset=name)
    assert preset["sources"]
    assert {"model", "dtype", "steps", "guidance", "frames", "fps", "height", "width"} <= preset[
        "settings"
    ].keys()
    assert Render(**settings.model_dump()) == settings
    assert Render(preset=name, steps=7).steps == 7
    family = {"cogv": "CogVideoX", "wan2": "Wan", "huny": "HunyuanVideo", "ltx-": "LTX", "moch": "Mochi"}[
        name[:4]
    ]
    call_arguments(getattr(diffusers, f"{family}Pipeline"), settings)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="there are cogvideox-2b, cogvideox-5b"):
        Render(preset="sora")


@pytest.fixture
def settings(tiny_models: Path) -> dict[str, Any]:
    size = {"frames": 9, "height": 32, "width": 48}
    return {"model": str(tiny_models / "video"), "dtype": "float32", "steps": 6, **size}


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        ("first_block", {"threshold": 10.0}),
        ("faster", {"spatial_attention_block_skip_range": 2, "tensor_format": "BFCHW"}),
        (
            "pyramid",
            {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [0, 1000]},
        ),
        ("taylorseer", {"cache_interval": 2, "cache_identifiers": ["^transformer_blocks.*attn1"]}),
    ],
)
def test_caches_change_little_and_start_afresh(
    settings: dict[str, Any], cache: str, options: dict[str, Any]
) -> None:
    plain = VideoEngine(Render(**settings)).render(["a cat"], [1])[0]
    engine = VideoEngine(Render(**settings, cache=cache, cache_options=options))
    first, other, again = (engine.render([prompt], [1])[0] for prompt in ("a cat", "a dog", "a cat"))
    assert isinstance(first, np.ndarray), first
    assert isinstance(other, np.ndarray), other
    assert np.array_equal(first, again)
    assert 0 < np.abs(first.astype(int) - plain).mean() < 30


def test_attention_backend_is_applied(settings: dict[str, Any]) -> None:
    engine = VideoEngine(Render(**settings, attention="_native_math"))
    assert isinstance(engine.render(["a cat"], [1])[0], np.ndarray)
    # diffusers keeps the last one that was set for every model of the process.
    engine.pipeline.transformer.set_attention_backend("native")


def test_every_repeated_block_is_compiled(settings: dict[str, Any], folders: dict[str, Path]) -> None:
    cog = VideoEngine(Render(**settings, compile=True)).pipeline.transformer.transformer_blocks
    wan = VideoEngine(Render(**tiny_settings("wan2.1-1.3b", folders["wan2.1-1.3b"]), compile=True))
    for block in (*cog, *wan.pipeline.transformer.blocks):
        assert block._compiled_call_impl is not None


def test_scheduler_and_call_options_are_applied(settings: dict[str, Any]) -> None:
    options = {
        "scheduler_options": {"timestep_spacing": "linspace"},
        "call_options": {"use_dynamic_cfg": True},
    }
    engine = VideoEngine(Render(**settings, **options))
    assert engine.pipeline.scheduler.config.timestep_spacing == "linspace"
    plain = VideoEngine(Render(**settings)).render(["a cat"], [1])[0]
    assert not np.array_equal(engine.render(["a cat"], [1])[0], plain)


def test_vae_keeps_its_own_precision(settings: dict[str, Any]) -> None:
    engine = VideoEngine(Render(**(settings | {"dtype": "bfloat16", "vae_dtype": "float32"})))
    assert (engine.pipeline.vae.dtype, engine.pipeline.transformer.dtype) == (torch.float32, torch.bfloat16)


def test_long_prompts_can_be_an_error(settings: dict[str, Any]) -> None:
    engine = VideoEngine(Render(**settings, long_prompts="error"))
    long, short = engine.render(["word " * 5000, "a cat"], [1, 2])
    assert "takes 226" in str(long)
    assert isinstance(short, np.ndarray)
    assert engine.truncated == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"scheduler_options": {"flow": 1}},
            "render.scheduler_options: CogVideoXDDIMScheduler has no option flow",
        ),
        (
            {"call_options": {"guidance_scale_2": 3.0}},
            "render.call_options: CogVideoXPipeline has no guidance_scale_2",
        ),
        ({"call_options": {"num_frames": 9}}, "has no num_frames to set here"),
        ({"attention": "magic"}, "render.attention=magic"),
        (
            {"cache": "first_block", "cache_options": {"speed": 9}},
            "FirstBlockCacheConfig has no option speed",
        ),
        ({"cache": "first_block", "batch_size": 2}, "set render.batch_size=1"),
        ({"cache": "taylorseer"}, "no module that it would cache"),
        ({"offload": "model", "device": "cpu"}, "no accelerator"),
    ],
)
def test_options_that_a_pipeline_lacks_are_refused_by_name(
    settings: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(VideoModelError) as refusal:
        VideoEngine(Render(**(settings | changes)))
    assert says in str(refusal.value)
