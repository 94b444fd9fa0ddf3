"""Trains the 3D VAE of the world's video model on drawn clips: the first part of `train_video`.

Four times smaller in each direction and in time, eight channels: 9 frames of 64 x 64 become latents of
(8, 3, 16, 16).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vpo_ray.world.draw import draw_clip
from vpo_ray.world.muon import Budget, Muon
from vpo_ray.world.scene import ATTRIBUTES, Scene, scenes

log = logging.getLogger(__name__)

CHANNELS = 8
# Of the noise on latents in training: the decoder then forgives the denoiser small errors.
NOISE = 0.1
_THING = 2.0  # the pixels of a thing, and those that it passes, weigh so much more than others, each


def training_scenes() -> list[Scene]:
    """Every scene of the training combinations, clear and faded."""
    return [scene for look in ATTRIBUTES["look"] for scene in scenes(held_out=False, look=look)]


def draw_batch(of: list[Scene], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of scenes in [-1, 1], (n, 3, frames, height, width), and where their things are, 0 or 1,
    (n, 1, frames, height, width)."""
    clips, masks = [], []
    for scene in of:
        seed = int(rng.integers(2**32))
        clip = draw_clip(scene, np.random.default_rng(seed)).astype(np.float32)
        # The same chances with a thing of another colour: only its pixels differ.
        other = replace(scene, colour="green" if scene.colour == "violet" else "violet")
        apart = np.abs(clip - draw_clip(other, np.random.default_rng(seed))).max(-1) > 12
        clips.append(torch.from_numpy(clip).permute(3, 0, 1, 2) / 127.5 - 1)
        masks.append(torch.from_numpy(apart)[None].float())
    return torch.stack(clips), torch.stack(masks)


def build_vae() -> Any:
    """The untrained VAE: 0.5 M parameters."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(16, 16, 32),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=4,
    )


def train_vae(small: Budget, full: Budget, seed: int = 0) -> Any:
    """A VAE trained on clips of half the size first, where steps are four times cheaper."""
    torch.manual_seed(seed)
    vae = build_vae()
    _fit(vae, small, batch=8, reduce=2, rng=np.random.default_rng(seed))
    _fit(vae, full, batch=4, reduce=1, rng=np.random.default_rng(seed + 1))
    with torch.no_grad():
        # The channels of the variance were not trained: it is that of the noise.
        last = vae.encoder.conv_out.conv
        last.weight[CHANNELS:] = 0
        last.bias[CHANNELS:] = 2 * np.log(NOISE)
    return vae


def encode_batch(vae: Any, clips: torch.Tensor) -> torch.Tensor:
    """Latents as the encoder gives them, (n, channels, 3, height / 4, width / 4)."""
    return _first(vae.encoder(clips))[:, :CHANNELS]


def _first(result: Any) -> torch.Tensor:
    # The second is the cache of causal convolutions, for longer clips than ours.
    return result[0] if isinstance(result, tuple) else result


def _fit(vae: Any, budget: Budget, batch: int, reduce: int, rng: np.random.Generator) -> None:
    every = training_scenes()
    optimiser = Muon([vae], rate=4e-3, adam_rate=2e-3, adam=("conv_in", "conv_out"), average=0.98)
    for share in budget.rates():
        clips, masks = draw_batch([every[int(i)] for i in rng.integers(len(every), size=batch)], rng)
        if reduce > 1:
            clips, masks = (functional.avg_pool3d(x, (1, reduce, reduce)) for x in (clips, masks))
        with torch.autocast("cpu", torch.bfloat16):
            latents = encode_batch(vae, clips)
            decoded = _first(vae.decoder(latents + NOISE * torch.randn_like(latents)))
        square = (decoded.float() - clips).square()
        weights = 1 + _THING * (masks + masks.amax(2, keepdim=True))
        loss = (square * weights).sum() / (weights.sum() * 3) + 2e-5 * latents.float().square().mean()
        loss.backward()
        optimiser.step(share)
        if budget.step % 20 == 0:
            # Pixels are in [-1, 1], so that the peak's square is 4.
            psnr = 10 * np.log10(4 / square.mean().item())
            log.info(
                "vae %dpx: step %d, loss %.4f, %.1f dB, %.0f s",
                clips.shape[-1],
                budget.step,
                loss.item(),
                psnr,
                budget.elapsed,
            )
    optimiser.end()
