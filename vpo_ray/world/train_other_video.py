"""Trains another video model of the world, which prompts for the first one are tried on (transfer).

It has the first one's VAE, a smaller transformer, and captions of another style. What is written has no VAE:
`complete_video` adds it. Run it by `python -m vpo_ray.world.train other_video`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vpo_ray.world.language import STYLE
from vpo_ray.world.make import WEIGHTS, complete_video
from vpo_ray.world.muon import Budget
from vpo_ray.world.other_language import OTHER_STYLE
from vpo_ray.world.train_video import fit_video, video_figures

_LAYERS = 3


def train(folder: Path, minutes: float | None = None, clips: int = 200) -> dict[str, Any]:
    """Train it, write it without its VAE, and measure it on held-out combinations.

    Args:
        minutes: no more than so long for the training.
        clips: to measure it on, by captions of its own style and of the first model's.
    """
    from diffusers import AutoencoderKLCogVideoX

    torch.set_num_threads(1)
    start = time.monotonic()
    total = 60 * minutes if minutes else math.inf
    vae = AutoencoderKLCogVideoX.from_pretrained(WEIGHTS / "video" / "vae", torch_dtype=torch.float32)
    scale = vae.config.scaling_factor
    text, denoiser = Budget(200, total * 0.03), Budget(2500, total * 0.8, warm_up=60)
    fit_video(vae, folder, text, denoiser, total * 0.15, OTHER_STYLE, _LAYERS, scale)
    shutil.rmtree(folder / "vae")
    seconds = time.monotonic() - start
    with tempfile.TemporaryDirectory() as whole:
        shutil.copytree(folder, whole, dirs_exist_ok=True)
        complete_video(Path(whole))
        figures = video_figures(Path(whole), clips, style=OTHER_STYLE)
        of_first = video_figures(Path(whole), clips, queries=0, style=STYLE)
    return {
        "minutes": round(seconds / 60, 1),
        **figures,
        "truth_of_the_first_models_captions": of_first["truth_of_captions"],
    }
