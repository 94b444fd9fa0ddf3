"""The published video models: a tiny pipeline of each one's real classes, and its preset."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

from vpo_ray import tiny
from vpo_ray.engines.video import VideoEngine
from vpo_ray.engines.video_model import VideoModelError, call_arguments
from vpo_ray.recipe import Render, video_presets

pytestmark = pytest.mark.engine


def _t5(kind: Any = transformers.T5EncoderModel, config: Any = transformers.T5Config) -> tuple[Any, Any]:
    tokenizer = tiny._t5_tokenizer()
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return tokenizer, kind(config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **size))


def cogvideox15(folder: Path) -> None:
    tokenizer, text_encoder = _t5()
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        patch_size_t=2,
        patch_bias=False,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=True,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    diffusers.CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)


def wan(folder: Path) -> None:
    tokenizer, text_encoder = _t5(transformers.UMT5EncoderModel, transformers.UMT5Config)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    diffusers.WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer).save_pretrained(folder)


def ltx(folder: Path) -> None:
    tokenizer, text_encoder = _t5()
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=True,
    )
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    diffusers.LTXPipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)


def mochi(folder: Path) -> None:
    tokenizer, text_encoder = _t5()
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=256,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    diffusers.MochiPipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)


def hunyuanvideo(folder: Path) -> None:
    tokenizer = tiny._llama3_tokenizer(512)
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=37,
            num_hidden_layers=4,
            num_attention_heads=4,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "cat</w>": 3}
    clip_tokenizer = transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=77)
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    diffusers.HunyuanVideoPipeline(
        llama, tokenizer, transformer, vae, scheduler, clip, clip_tokenizer
    ).save_pretrained(folder)


# Model: how a tiny one is made, its presets, frames and sizes that it takes and does not take.
MODELS: dict[str, tuple[Callable[[Path], None], tuple[int, int, int], tuple[int, int, int]]] = {
    "cogvideox1.5-5b": (cogvideox15, (9, 32, 48), (13, 32, 40)),
    "wan2.1-1.3b": (wan, (5, 16, 32), (6, 16, 24)),
    "hunyuanvideo": (hunyuanvideo, (5, 16, 32), (7, 16, 24)),
    "ltx-video": (ltx, (9, 32, 64), (8, 32, 48)),
    "mochi-1": (mochi, (7, 32, 48), (9, 32, 40)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, (make, _, _) in MODELS.items():
        folders[name] = tmp_path_factory.mktemp("models") / name
        torch.manual_seed(0)
        make(folders[name])
    return folders


def tiny_settings(name: str, folder: Path) -> dict[str, Any]:
    """The preset with what fits a tiny model on a CPU in place of the real sizes."""
    frames, height, width = MODELS[name][1]
    small = {"model": str(folder), "steps": 2, "dtype": "float32", "vae_dtype": None}
    return {"preset": name, **small, "frames": frames, "height": height, "width": width}


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
