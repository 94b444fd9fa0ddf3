"""Tiny pipelines of the published video models' real classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from vpo_ray.world import tiny


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


def wan_i2v(folder: Path) -> None:
    """As Wan 2.1: the image's latents and mask beside the noise, and what CLIP sees of it."""
    tokenizer, text_encoder = _t5(transformers.UMT5EncoderModel, transformers.UMT5Config)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=4,
    )
    image_encoder = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=4,
            projection_dim=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            intermediate_size=16,
            patch_size=4,
        )
    )
    diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        image_encoder=image_encoder,
        transformer=transformer,
    ).save_pretrained(folder)


def ltx(folder: Path, pipeline: Any = diffusers.LTXPipeline) -> None:
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
    pipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)


def ltx_i2v(folder: Path) -> None:
    ltx(folder, diffusers.LTXImageToVideoPipeline)


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
    tokenizer = tiny.llama3_tokenizer(512)
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


def make_tiny(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    MODELS[name][0](folder)
    return folder


def tiny_settings(name: str, folder: Path) -> dict[str, Any]:
    """The preset with what fits a tiny model on a CPU in place of the real sizes."""
    frames, height, width = MODELS[name][1]
    small = {"model": str(folder), "steps": 2, "dtype": "float32", "vae_dtype": None}
    return {"preset": name, **small, "frames": frames, "height": height, "width": width}
