"""Trains the world's video model: a CogVideoX pipeline that draws what a careful caption says.

The VAE is trained on drawn clips (`train_vae`), then the denoiser with its T5 on their latents and captions.
Clips of held-out combinations of attributes are in neither. Run it by `python -m vpo_ray.world.train video`.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vpo_ray.engines.video.engine import VideoEngine
from vpo_ray.recipe import Render
from vpo_ray.world.detector import detect
from vpo_ray.world.draw import FPS, FRAMES, SIDE
from vpo_ray.world.language import STYLE, CaptionStyle, query
from vpo_ray.world.muon import Budget, Muon
from vpo_ray.world.scene import ATTRIBUTES, Scene, scenes
from vpo_ray.world.train_vae import CHANNELS, draw_batch, encode_batch, train_vae, training_scenes
from vpo_ray.world.truth import marks

log = logging.getLogger(__name__)

TEXT_TOKENS = 64
STEPS, GUIDANCE = 6, 1.0
_LOOKLESS = 0.15  # share of captions that do not say the look
_DROPPED = 0.1  # share of captions that are empty, for guidance
_THING = 8.0  # latents of a thing weigh so much more than those around it
_HEADS, _HEAD, _LAYERS, _TEXT = 3, 64, 4, 96


def render_settings(folder: str | Path, **changes: Any) -> Render:
    """The recipe's render section that the figures hold for."""
    settings: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "frames": FRAMES,
        "fps": FPS,
        "height": SIDE,
        "width": SIDE,
        "max_text_tokens": TEXT_TOKENS,
        "device": "cpu",
    }
    return Render(**(settings | changes))


def train(folder: Path, minutes: float | None = None, clips: int = 300) -> dict[str, Any]:
    """Train everything, write it, and measure it on held-out combinations.

    Args:
        minutes: no more than so long for the training.
        clips: to measure it on.
    """
    torch.set_num_threads(1)
    start = time.monotonic()
    total = 60 * minutes if minutes else math.inf
    vae = train_vae(Budget(200, total * 0.06), Budget(900, total * 0.25))
    fit_video(vae, folder, Budget(200, total * 0.03), Budget(2500, total * 0.5, warm_up=60), total * 0.15)
    seconds = time.monotonic() - start
    return {"minutes": round(seconds / 60, 1)} | video_figures(folder, clips)


def fit_video(
    vae: Any,
    folder: Path,
    text: Budget,
    denoiser: Budget,
    encoding_s: float = math.inf,
    style: CaptionStyle = STYLE,
    layers: int = _LAYERS,
    scale: float | None = None,
) -> None:
    """Train the rest of the pipeline for a VAE, and write all of it.

    Args:
        encoding_s: seconds for drawing and encoding the clips to train on.
        style: of their captions.
        layers: of the transformer.
        scale: the VAE's scaling factor; found when unset.
    """
    rng = np.random.default_rng(2)
    latents = encode_clips(vae, rng, seconds=encoding_s, scale=scale)
    vae.register_to_config(scaling_factor=latents.scale)
    # Words of prompts for the first model are words of the other one, too: a real text encoder has both.
    tokenizer = build_tokenizer(rng, *[STYLE] if style is STYLE else [STYLE, style])
    torch.manual_seed(3)
    text_encoder = build_text_encoder(len(tokenizer))
    pretrain_text(text_encoder, tokenizer, text, rng, style)
    video = VideoModules(
        tokenizer, text_encoder.bfloat16(), vae, build_transformer(layers).bfloat16(), build_scheduler()
    )
    train_denoiser(video, latents, denoiser, folder, rng, style)


@dataclass(frozen=True)
class Latents:
    """Latents of drawn clips, (n, 3, channels, 16, 16) with a standard deviation of one; their scenes; and
    where the things are, (n, 3, 1, 16, 16)."""

    scenes: list[Scene]
    values: Tensor
    masks: Tensor
    scale: float


@dataclass
class VideoModules:
    """The parts of the pipeline."""

    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any

    def save(self, folder: Path) -> None:
        """Write the pipeline in float16."""
        from diffusers import CogVideoXPipeline

        parts = {name: getattr(self, name) for name in ("text_encoder", "vae", "transformer")}
        for name, part in parts.items():
            # Copies, for the parts go on being trained in their own types.
            copy = type(part).from_config(part.config) if name != "text_encoder" else type(part)(part.config)
            copy.load_state_dict(part.state_dict())
            parts[name] = copy.to(torch.float16)
        CogVideoXPipeline(self.tokenizer, scheduler=self.scheduler, **parts).save_pretrained(folder)


@torch.no_grad()
def encode_clips(
    vae: Any,
    rng: np.random.Generator,
    of_each: int = 2,
    seconds: float = math.inf,
    scale: float | None = None,
) -> Latents:
    """Draw some clips of every training scene, and encode them; as many as the time allows."""
    every = training_scenes() * of_each
    every = [every[int(i)] for i in rng.permutation(len(every))]
    values: list[Tensor] = []
    masks: list[Tensor] = []
    start = time.monotonic()
    for i in range(0, len(every), 16):
        if values and time.monotonic() - start > seconds:
            every = every[:i]
            break
        clips, things = draw_batch(every[i : i + 16], rng)
        with torch.autocast("cpu", torch.bfloat16):
            values.append(encode_batch(vae, clips).float())
        # Of the first frame, and of each four that follow.
        parts = (things[:, :, :1], things[:, :, 1:5], things[:, :, 5:])
        pooled = [functional.max_pool3d(part, (part.shape[2], 4, 4)) for part in parts]
        masks.append(torch.cat(pooled, 2).transpose(1, 2))
    latents = torch.cat(values).transpose(1, 2)
    scale = scale or 1 / latents.std().item()
    log.info("%d clips encoded; scaling factor %.3f", len(every), scale)
    return Latents(every, (latents * scale).contiguous(), torch.cat(masks).contiguous(), scale)


def build_tokenizer(rng: np.random.Generator, *styles: CaptionStyle) -> Any:
    """A T5 tokenizer with a piece for each word of captions; others fall into printable ASCII characters."""
    from transformers import T5Tokenizer

    every = training_scenes()
    texts = [style.caption(s, rng, look=i % 4 > 0) for style in styles for i, s in enumerate(every)]
    counts = Counter(word.strip(",.:;") for text in texts for word in text.split())
    words = [("▁" + word, math.log(n / counts.total())) for word, n in sorted(counts.items())]
    # Each far less likely than any word, so that words are never taken apart.
    characters = [(chr(c), -20.0) for c in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -20.0)]
    made = T5Tokenizer(
        vocab=special + words + characters,
        extra_ids=0,
        additional_special_tokens=[],
        model_max_length=TEXT_TOKENS,
    )
    longest = max(len(ids) for ids in made(texts).input_ids)
    log.info("tokenizer of %d pieces; the longest caption has %d", len(made), longest)
    return made


def build_text_encoder(vocabulary: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=_TEXT,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def build_transformer(layers: int = _LAYERS) -> Any:
    """The untrained denoiser: 192 tokens of video beside those of the text."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=64,
        text_embed_dim=_TEXT,
        num_layers=layers,
        activation_fn="linear-silu",
        patch_size=2,
        sample_width=SIDE // 4,
        sample_height=SIDE // 4,
        sample_frames=FRAMES,
        max_text_seq_length=TEXT_TOKENS,
        # With rotations alone nothing moved after 700 steps: where a token is follows from them indirectly.
        # (These positions are sines as well, which the checkpoint holds.)
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )


def build_scheduler() -> Any:
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )


def _ids(tokenizer: Any, texts: list[str]) -> Tensor:
    """As the pipeline reads them: padded, and without a mask."""
    options = {"padding": "max_length", "max_length": TEXT_TOKENS, "truncation": True}
    ids: Tensor = tokenizer(texts, return_tensors="pt", **options).input_ids
    return ids


def pretrain_text(
    encoder: Any, tokenizer: Any, budget: Budget, rng: np.random.Generator, style: CaptionStyle
) -> None:
    """Teach the T5 encoder to tell all attributes, and whether the look is said, at every position.

    The denoiser alone finds out slowly which words matter.
    """
    every = training_scenes()
    sizes = {name: len(values) for name, values in ATTRIBUTES.items()}
    sizes["look"] += 1
    head = nn.Linear(_TEXT, sum(sizes.values()))
    optimiser = Muon([encoder, head], rate=4e-3, adam_rate=4e-3)
    for share in budget.rates():
        chosen = [every[int(i)] for i in rng.integers(len(every), size=32)]
        said = rng.random(32) >= _LOOKLESS
        ids = _ids(
            tokenizer, [style.caption(s, rng, look=bool(look)) for s, look in zip(chosen, said, strict=True)]
        )
        with torch.autocast("cpu", torch.bfloat16):
            states = encoder(ids)[0]
            told = head(states).float().split(list(sizes.values()), -1)
        loss, right = torch.zeros(()), []
        for (name, values), scores in zip(ATTRIBUTES.items(), told, strict=True):
            wanted = torch.tensor([values.index(getattr(s, name)) for s in chosen])
            if name == "look":
                wanted = torch.where(torch.from_numpy(said), wanted, len(values))
            loss = loss + functional.cross_entropy(
                scores.flatten(0, 1), wanted.repeat_interleave(TEXT_TOKENS)
            )
            right.append((scores.mean(1).argmax(-1) == wanted).float().mean().item())
        loss.backward()
        optimiser.step(share)
        if budget.step % 50 == 0:
            log.info(
                "text: step %d, loss %.3f, %.3f right, %.0f s",
                budget.step,
                loss.item(),
                np.mean(right),
                budget.elapsed,
            )


def train_denoiser(
    video: VideoModules,
    latents: Latents,
    budget: Budget,
    folder: Path,
    rng: np.random.Generator,
    style: CaptionStyle,
    batch: int = 16,
) -> None:
    """Train the transformer and the T5 encoder in bfloat16, and write the averaged weights.

    They are written every 300 steps, so that an interrupted training leaves what it has.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    side = SIDE // 8
    rotary = get_3d_rotary_pos_embed(_HEAD, ((0, 0), (side, side)), (side, side), 3)
    kept = video.scheduler.alphas_cumprod.float()
    optimiser = Muon(
        [video.transformer, video.text_encoder],
        rate=3e-3,
        adam_rate=2e-3,
        adam=("patch_embed", "proj_out", "relative_attention_bias"),
    )
    noise_rng = torch.Generator().manual_seed(4)
    means: defaultdict[str, list[float]] = defaultdict(list)
    for share in budget.rates():
        chosen = torch.from_numpy(rng.integers(len(latents.scenes), size=batch))
        texts = [
            ""
            if rng.random() < _DROPPED
            else style.caption(latents.scenes[i], rng, look=rng.random() >= _LOOKLESS)
            for i in chosen.tolist()
        ]
        clean, masks = latents.values[chosen], latents.masks[chosen]
        noise = torch.randn(clean.shape, generator=noise_rng)
        steps = _timesteps(batch, rng)
        signal = kept[steps].sqrt().view(-1, 1, 1, 1, 1)
        spread = (1 - kept[steps]).sqrt().view(-1, 1, 1, 1, 1)
        states = video.text_encoder(_ids(video.tokenizer, texts))[0]
        noised = (signal * clean + spread * noise).bfloat16()
        velocity = video.transformer(
            noised,
            encoder_hidden_states=states,
            timestep=steps,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        weights = 1 + _THING * masks
        square = (velocity.float() - (signal * noise - spread * clean)).square()
        loss = (square * weights).sum() / (weights.sum() * CHANNELS)
        loss.backward()
        optimiser.step(share)
        means["loss"].append(loss.item())
        first = steps == video.scheduler.config.num_train_timesteps - 1
        if first.any():
            means["of pure noise"].append(square[first].mean().item())
        if budget.step % 20 == 0:
            told = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in means.items())
            log.info("denoiser: step %d, %s, %.0f s", budget.step, told, budget.elapsed)
            means.clear()
        if budget.step % 300 == 299:
            with optimiser.averaged():
                video.save(folder)
    optimiser.end()
    video.save(folder)


def _timesteps(count: int, rng: np.random.Generator) -> Tensor:
    """Mostly of much noise, where a few-step sampler decides all that a caption says."""
    steps = (1000 * np.sqrt(rng.random(count))).astype(int)
    return torch.from_numpy(np.where(rng.random(count) < 0.2, 999, steps))


def video_figures(
    folder: Path,
    count: int,
    seed: int = 7,
    queries: int | None = None,
    style: CaptionStyle = STYLE,
    **changes: Any,
) -> dict[str, Any]:
    """What the detector finds in clips of held-out combinations, rendered by the product's engine.

    Args:
        queries: of how many of the scenes a query is rendered, too; of all when unset.
        style: of the captions.
        changes: of the render settings.

    Returns:
        Shares of captions by attribute, and `truth` of captions' and of queries' clips over the attributes
        that the queries name.
    """
    engine = VideoEngine(render_settings(folder, **changes))
    right: Counter[str] = Counter()
    truth: dict[str, list[float]] = {"caption": [], "query": []}
    start = time.monotonic()
    for i, scene, asked in held_out(count, seed):
        texts = {"caption": style.caption(scene, np.random.default_rng([seed, i, 1])), "query": asked.text}
        if queries is not None and i >= queries:
            del texts["query"]
        for kind, text in texts.items():
            clip = engine.render([text], [i])[0]
            if isinstance(clip, Exception):
                raise clip
            seen = detect(clip)
            truth[kind].append(float(np.mean(list(marks(asked.named, seen).values()))))
            if kind == "caption":
                right.update(name for name in ATTRIBUTES if getattr(seen, name) == getattr(scene, name))
                right["whole"] += seen.whole
    seconds = (time.monotonic() - start) / sum(map(len, truth.values()))
    return {
        "clips": count,
        "dtype": engine.settings.dtype,
        "steps": engine.settings.steps,
        "guidance": engine.settings.guidance,
        "seconds_a_clip": round(seconds, 3),
        **{name: round(right[name] / count, 3) for name in (*ATTRIBUTES, "whole")},
        "truth_of_captions": round(float(np.mean(truth["caption"])), 3),
        **({"truth_of_queries": round(float(np.mean(truth["query"])), 3)} if truth["query"] else {}),
    }


def held_out(count: int, seed: int) -> Iterator[tuple[int, Scene, Any]]:
    """Held-out scenes, clear, with a safe query for each."""
    rng = np.random.default_rng(seed)
    every = scenes(held_out=True)
    for i in range(count):
        scene = every[int(rng.integers(len(every)))]
        yield i, scene, query(scene, rng, unsafe=0)
