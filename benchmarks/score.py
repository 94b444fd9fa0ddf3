"""What one pass a video saves against asking every question by itself.

    python benchmarks/score.py

Both ways use the same middle-size model (LLM 512 x 8 layers, vision 256 x 8 layers, 7 frames of
224 px), float32, one thread. The per-question way does what VisionReward's script does for each
question: decode, encode, one full forward, greedy first token. Our pass shares the video and the
beginnings of questions that begin alike (as many as in VisionReward's published lists), and computes
in the last layer only what is read. Peak memory is that of a fresh process for each way. At real size
the FLOPs are counted by formula. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vpo_ray.engines.reward import checkpoint, frames, visionreward
from vpo_ray.engines.reward.checkpoint import Config, VisionConfig
from vpo_ray.engines.video.engine import encode
from vpo_ray.recipe import Checklist, Reward
from vpo_ray.world.tiny import make_reward

log = logging.getLogger("score")

MIDDLE = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_multi_query_heads": 2,
    "vision_config": {
        "hidden_size": 256,
        "image_size": 224,
        "intermediate_size": 2192,
        "num_heads": 8,
        "num_hidden_layers": 8,
        "num_positions": 257,
    },
}
# The published checkpoint (facts: cogvlm2-llama3-caption's config.json).
REAL = Config(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_multi_query_heads=8,
    vocab_size=128256,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    bos_token_id=128000,
    pad_token_id=128002,
    vision=VisionConfig(
        hidden_size=1792,
        image_size=224,
        in_channels=3,
        intermediate_size=15360,
        layer_norm_eps=1e-6,
        num_heads=16,
        num_hidden_layers=63,
        num_positions=257,
        patch_size=14,
    ),
)
QUERY = "a red fox walks through deep snow at the edge of a quiet forest"
SUBJECTS = ("light", "main shape", "place", "camera", "colors", "scene", "motion", "picture")
CLAIMS = (
    "free of any error from start to end",
    "pleasant to look at",
    "the same from start to end",
    "clear from the start",
    "better than around it",
    "in harmony with the scene",
    "real from start to end",
    "more lively than still",
)


def questions(count: int) -> list[dict[str, Any]]:
    """Three questions with the user's query in them, as the published list has, and others of about
    its length."""
    amounts = ("all that", "most of what", "some of what")
    slot = [f'Does the clip show {amount} "[[prompt]]" asks for?' for amount in amounts]
    others = [f"Is the {subject} {claim}?" for claim in CLAIMS for subject in SUBJECTS]
    return [{"question": text, "weight": 1.0} for text in (slot + others)[:count]]


def reward(folder: Path, count: int) -> visionreward.VisionReward:
    path = folder / f"checklist{count}.yaml"
    path.write_text(yaml.safe_dump({"questions": questions(count)}), "utf-8")
    checklist = Checklist(file=str(path))
    model = str(folder / "reward")
    return visionreward.build(Reward(model=model, dtype="float32", device="cpu", checklist=checklist))


def clip(seed: int) -> bytes:
    """49 frames at 8 fps of a moving, noisy gradient, 720 x 480."""
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[0:480, 0:720]
    colour = noise.uniform(0.2, 1.0, 3)
    film = [((np.sin(x / 90 + t / 4) + np.cos(y / 60 - t / 6) + 2) * 60)[..., None] for t in range(49)]
    grain = noise.integers(0, 8, (49, 480, 720, 1))
    return encode((np.stack(film) * colour + grain).clip(0, 255).astype(np.uint8), 8, 17)


class Clock:
    """Wall and CPU seconds since it was made; CPU seconds count on a machine that others use too."""

    def __init__(self) -> None:
        self.start = np.array([time.perf_counter(), time.process_time()])

    def seconds(self) -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()]) - self.start


def per_question(scorer: visionreward.VisionReward, video: bytes) -> Iterator[tuple[int, np.ndarray]]:
    """Most likely token and seconds of each question, everything done anew for it."""
    size = scorer.model.config.vision.image_size
    for question in scorer.checklist.questions:
        clock = Clock()
        chosen = torch.from_numpy(frames.read_frames(video, scorer.pick))
        features = scorer.model.encode(frames.preprocess(chosen, size))
        layout = scorer.layout(len(chosen), QUERY, [question])
        hidden = scorer.model.hidden_states([layout], [features])[layout.last[0]]
        token = int(scorer.model.llm.lm_head(hidden).argmax())
        yield token, clock.seconds()


def one_pass(scorer: visionreward.VisionReward, video: bytes) -> tuple[list[int], np.ndarray]:
    clock = Clock()
    logits = scorer.logits([video], [QUERY])[0]
    if isinstance(logits, Exception):
        raise logits
    return logits.argmax(-1).tolist(), clock.seconds()


def compare(folder: Path, counts: Sequence[int], videos: int, every: int) -> dict[str, Any]:
    """Speed-ups and equal answers. The largest checklist holds the smaller ones' questions, so one
    per-question run serves all; beyond the first video it asks the smallest checklist only. A pass
    of each checklist follows every few single questions, so that both ways see the same machine."""
    scorers = {count: reward(folder, count) for count in counts}
    result: dict[str, Any] = {}
    equal = asked = 0
    for index in range(videos):
        video, counts_here = clip(index), counts if index == 0 else counts[:1]
        one_pass(scorers[counts[0]], video)
        tokens: list[int] = []
        seconds: list[np.ndarray] = []
        passes: dict[int, list[tuple[list[int], np.ndarray]]] = {count: [] for count in counts_here}
        for token, spent in per_question(scorers[counts_here[-1]], video):
            tokens.append(token)
            seconds.append(spent)
            if len(tokens) % every == 0:
                for count in counts_here:
                    passes[count].append(one_pass(scorers[count], video))
        for count in counts_here:
            equal += sum(a == b for a, b in zip(passes[count][0][0], tokens, strict=False))
            asked += count
            slow = np.mean(seconds, axis=0) * count
            fast = np.mean([spent for _, spent in passes[count]], axis=0)
            log.info("video %d, %d questions: %.1f s against %.2f s", index, count, slow[0], fast[0])
            if index == 0:
                result[f"questions_{count}"] = figures(scorers[count], slow, fast)
    return result | {"answers_equal": equal, "answers": asked}


def figures(scorer: visionreward.VisionReward, slow: np.ndarray, fast: np.ndarray) -> dict[str, Any]:
    layout = scorer.layout(7, QUERY)
    alone = [len(layout.question(i)) for i in range(len(layout.last))]
    config = scorer.model.config
    ours = flops(config, 7, len(layout.tokens.ids) - layout.prefix, len(alone), read_only=True)
    ratio = sum(flops(config, 7, n, 1) for n in alone) / ours
    return {
        "speedup": round(slow[0] / fast[0], 2),
        "speedup_cpu_time": round(slow[1] / fast[1], 2),
        "per_question_s": round(slow[0], 2),
        "one_pass_s": round(fast[0], 3),
        "prefix_tokens": layout.prefix,
        "question_tokens": sum(alone),
        "question_tokens_shared": len(layout.tokens.ids) - layout.prefix,
        "model_flop_ratio": round(ratio, 2),
    }


def flops(
    config: Config, frame_count: int, question_tokens: int, answers: int, read_only: bool = False
) -> float:
    """Multiply-adds times two of one pass over a video and tokens of questions (attention between
    question tokens, under 1 in 100, left out).

    Args:
        read_only: the last layer computes the answers' tokens, and keys and values of all.
    """
    v, d, ffn = config.vision, config.hidden_size, config.intermediate_size
    w, tokens, merged = v.hidden_size, v.num_positions, v.frame_tokens - 2
    layer = 2 * tokens * (4 * w * w + 2 * w * v.intermediate_size) + 4 * tokens**2 * w
    patches = 2 * (tokens - 1) * v.in_channels * v.patch_size**2 * w
    adapter = 2 * merged * (4 * w * w + w * d + 3 * d * ffn)
    vision = frame_count * (v.num_hidden_layers * layer + patches + adapter)
    prefix = 1 + frame_count * (v.frame_tokens + 1)
    kv = 2 * 2 * config.num_multi_query_heads * config.head_dim * d
    rest = 2 * (d * d + d * d + 3 * d * ffn)
    row = prefix + question_tokens
    full = row * (kv + rest) + 4 * d * (prefix**2 / 2 + question_tokens * prefix)
    last = row * kv + answers * (rest + 4 * d * prefix) if read_only else full
    head = 2 * answers * d * config.vocab_size
    return vision + (config.num_hidden_layers - 1) * full + last + head


def predicted() -> dict[str, Any]:
    """TFLOPs a video at real size, with questions of 19 tokens (the published ones' mean) that share
    no beginning."""
    found = {}
    for frame_count in (7, 24):
        for count in (29, 64):
            ours = flops(REAL, frame_count, 19 * count, count, read_only=True)
            theirs = count * flops(REAL, frame_count, 19, 1)
            found[f"{frame_count}_frames_{count}_questions"] = {
                "one_pass_tflop": round(ours / 1e12, 1),
                "per_question_tflop": round(theirs / 1e12, 1),
                "ratio": round(theirs / ours, 1),
            }
    return found


def memory(folder: Path, way: str) -> dict[str, int]:
    """Peak memory of a fresh process that scores one video this way."""
    command = [sys.executable, __file__, "--folder", str(folder), "--peak", way]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def peak(folder: Path, way: str) -> dict[str, int]:
    """MiB of this process: with the loaded model, and at most while it scores (Linux only)."""
    scorer = reward(folder, 29)
    video = (folder / "clip.mp4").read_bytes()
    loaded = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # starts VmHWM, the peak, anew
    if way == "one_pass":
        one_pass(scorer, video)
    else:
        next(per_question(scorer, video))
    return {"loaded_mib": loaded, "peak_mib": status("VmHWM")}


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        make_reward(Path(temporary) / "reward", MIDDLE)
        (Path(temporary) / "clip.mp4").write_bytes(clip(0))
        yield Path(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description="One pass a video against one forward a question.")
    parser.add_argument("--videos", type=int, default=1, help="clips to compare answers on (%(default)s)")
    parser.add_argument("--every", type=int, default=16, help="questions between two passes (%(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=("one_pass", "per_question"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    with workplace(args.folder) as folder:
        if args.peak:
            sys.stdout.write(json.dumps(peak(folder, args.peak)) + "\n")
            return
        peaks = {way: memory(folder, way) for way in ("one_pass", "per_question")}
        result = compare(folder, (29, 64), args.videos, args.every)
        config = checkpoint.read_config(folder / "reward")
        parameters = sum(int(np.prod(shape)) for shape in checkpoint.tensor_shapes(config).values())
    result |= {
        "memory": peaks,
        "peak_ratio": round(peaks["one_pass"]["peak_mib"] / peaks["per_question"]["peak_mib"], 3),
        "parameters": parameters,
        "real_size_by_formula": predicted(),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
