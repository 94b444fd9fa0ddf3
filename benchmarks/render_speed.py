"""Seconds a video and memory of a real-size model: plain, compiled, quantised, and with each cache.

    python benchmarks/render_speed.py --preset cogvideox-5b
    python benchmarks/render_speed.py --model /models/CogVideoX-5b --variants plain,compiled

Needs a GPU for the real size. Without `--model` the preset's architecture gets random weights
(20 GB in a temporary folder): what is computed is the same, what is seen is noise. `first_block`
decides by the activations what to skip, so with random weights its figure means nothing; the other
caches skip by the step. Each variant runs in a process of its own through the package's engine, is
warmed up, and then renders `--videos` videos, of which the median counts. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vpo_ray.engines.video.engine import VideoEngine
from vpo_ray.recipe import Render, video_presets
from vpo_ray.world.tiny import make_video

log = logging.getLogger("render_speed")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "float8": {"quantize": "float8_dynamic"},
    "compiled+float8": {"compile": True, "quantize": "float8_dynamic"},
    "compiled+int8": {"compile": True, "quantize": "int8_dynamic"},
    "first_block": {"cache": "first_block"},
    "faster": {"cache": "faster"},
    "pyramid": {"cache": "pyramid"},
    "taylorseer": {"cache": "taylorseer"},
}
PROMPT = "A tabby cat sits on a sunny windowsill and watches the rain outside, its tail swaying slowly."

# What differs from diffusers' and transformers' defaults. CogVideoX-5B (github.com/zai-org/CogVideo):
# 48 heads and 42 layers, 5.57 billion parameters. Its text encoder is T5 v1.1 XXL, 4.76 billion.
COGVIDEOX_5B: dict[str, dict[str, Any]] = {
    "transformer": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    "vae": {"scaling_factor": 0.7},
    "text_encoder": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds a video and memory of a real-size video model.")
    parser.add_argument("--preset", default="cogvideox-5b", help="settings to render with (%(default)s)")
    parser.add_argument("--model", help="folder with weights; random ones of CogVideoX-5B's size if absent")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of %(default)s")
    parser.add_argument("--videos", type=int, default=3, help="videos after the warm-up (%(default)s)")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="other render settings"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one variant, in a process of its own
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    if args.measure:
        sys.stdout.write(json.dumps(measure(settings_of(args), args.measure, args.videos)) + "\n")
        return
    names = args.variants.split(",")
    if unknown := set(names) - VARIANTS.keys():
        parser.error(f"--variants: there is no {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            args.model = folder
            log.info("writing random weights to %s", folder)
            random_weights(Path(folder))
        results = {name: in_a_process(args, name) for name in names}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    sys.stdout.write(json.dumps({"device": device, "torch": torch.__version__, "variants": results}) + "\n")


def settings_of(args: argparse.Namespace) -> Render:
    given = dict(item.split("=", 1) for item in args.set)
    steps = {"steps": args.steps} if args.steps else {}
    preset = video_presets()[args.preset]["settings"]
    return Render.model_validate({**preset, "model": args.model, **steps, **given})


def in_a_process(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A variant's figures, or its error: a cache or a number format that this device lacks is a result."""
    sets = [part for item in args.set for part in ("--set", item)]
    steps = ["--steps", str(args.steps)] if args.steps else []
    command = [sys.executable, __file__, "--measure", name, "--model", args.model, "--preset", args.preset]
    done = subprocess.run(
        [*command, "--videos", str(args.videos), *steps, *sets], capture_output=True, text=True, check=False
    )
    if done.returncode:
        result = {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    else:
        result = json.loads(done.stdout.splitlines()[-1])
    log.info("%s: %s", name, result)
    return result


def measure(settings: Render, name: str, videos: int) -> dict[str, Any]:
    """Seconds to load, of the first render and of the median one after it, and the peak of memory."""
    settings = Render.model_validate({**settings.model_dump(exclude={"preset"}), **VARIANTS[name]})
    on_gpu = torch.cuda.is_available()
    start = time.perf_counter()
    engine = VideoEngine(settings)
    loaded = time.perf_counter() - start
    seconds, refused = [], None
    for seed in range(1 + videos):
        start = time.perf_counter()
        [video] = engine.render([PROMPT], [seed])
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        refused = str(video) if isinstance(video, Exception) else refused
    return {
        "seconds": round(statistics.median(seconds[1:]), 2),
        "first_seconds": round(seconds[0], 2),
        "load_seconds": round(loaded, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if on_gpu else None,
        # Random weights may make frames that the engine would not store; the time is the same.
        **({"refused": refused} if refused else {}),
    }


def random_weights(folder: Path, sizes: dict[str, dict[str, Any]] = COGVIDEOX_5B) -> None:
    """A CogVideoX pipeline as `from_pretrained` reads one, in bfloat16."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    with tempfile.TemporaryDirectory() as tiny:
        make_video(tiny)
        tokenizer = T5Tokenizer.from_pretrained(f"{tiny}/tokenizer")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        # Ten billion random numbers: minutes on a CPU.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            CogVideoXPipeline(
                tokenizer,
                T5EncoderModel(T5Config(**sizes["text_encoder"])),
                AutoencoderKLCogVideoX(**sizes["vae"]),
                CogVideoXTransformer3DModel(**sizes["transformer"]),
                CogVideoXDPMScheduler(),
            ).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    main()
