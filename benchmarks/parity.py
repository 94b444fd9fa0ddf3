"""How exactly the reward model agrees with its reference: `python benchmarks/parity.py DIR`.

DIR holds a checkpoint and what the reference implementation computed with it (the layout is in
its README). All questions of a video go through in one pass, as in production. The last line is
one JSON object: largest differences, exact matches as "equal/total", answers equal by template.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vpo_ray.engines.reward import frames, model, sequence

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Tally:
    """Exact matches and largest differences, by name."""

    def __init__(self) -> None:
        self.exact: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.diff: dict[str, float] = defaultdict(float)
        self.means: dict[str, list[float]] = defaultdict(list)

    def same(self, name: str, equal: bool) -> None:
        self.exact[name][0] += bool(equal)
        self.exact[name][1] += 1

    def close(self, name: str, value: torch.Tensor, expected: torch.Tensor) -> None:
        difference = (value.float() - expected.float()).abs()
        self.diff[name] = max(self.diff[name], difference.max().item())
        self.means[name].append(difference.mean().item())

    def report(self) -> dict[str, Any]:
        return {
            "exact": {name: f"{equal}/{total}" for name, (equal, total) in self.exact.items()},
            "max_abs": dict(self.diff),
            "mean_abs": {name: sum(v) / len(v) for name, v in self.means.items() if "logits" in name},
        }


class Golden:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected = json.loads((folder / "expected.json").read_text("utf-8"))
        self._tensors = safe_open(folder / "expected.safetensors", "pt")
        self._names = set(self._tensors.keys())
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, clean_up_tokenization_spaces=False)
        self.templates = list(dict.fromkeys(case["template_version"] for case in self.expected["cases"]))

    def tensor(self, name: str) -> torch.Tensor | None:
        return self._tensors.get_tensor(name) if name in self._names else None

    def cases(self, template: str, video: int) -> list[dict[str, Any]]:
        cases = self.expected["cases"]
        return [c for c in cases if c["template_version"] == template and c["video"] == video]


def sampling(golden: Golden, tally: Tally) -> None:
    for clip in json.loads((golden.folder / "sampling.json").read_text("utf-8")):
        rate = float(Fraction(clip["fps"]))
        times = [i / rate for i in range(clip["decord_len"])]
        for strategy in ("chat", "base"):
            chosen = frames.choose_frames(times, clip["decord_avg_fps"], strategy)  # type: ignore[arg-type]
            tally.same("sampled_frames", chosen == clip[strategy])


def decoding(golden: Golden, tally: Tally) -> None:
    for video in golden.expected["videos"]:
        array = np.load(golden.folder / video["npz"])["frames"]
        tally.same("npz_sha256", hashlib.sha256(array.tobytes()).hexdigest() == video["sha256_frames"])
        for name in (key for key in video if key.endswith(".mp4")):
            every = frames.read_frames((golden.folder / name).read_bytes(), lambda t, _: list(range(len(t))))
            found = hashlib.sha256(every.tobytes()).hexdigest()
            tally.same("decoded_sha256", found == video[name]["sha256_decoded"])


def rope(golden: Golden, net: model.CogVLM2Video, dtype: str, tally: Tally) -> None:
    cos_expected, example = golden.tensor(f"rope/cos_{dtype}"), golden.tensor(f"rope/example_in_{dtype}")
    if cos_expected is None:
        return
    positions = torch.arange(len(cos_expected))[None]
    cos, sin = net.llm.model.rotary_emb(torch.empty(0, dtype=DTYPES[dtype]), positions)
    half = cos_expected.shape[1]
    for name, value in (("cos", cos), ("sin", sin)):
        tally.same(f"rope_{dtype}", torch.equal(value[0, :, :half], golden.tensor(f"rope/{name}_{dtype}")))
    if example is not None:
        rotated, _ = apply_rotary_pos_emb(example, example, cos, sin)
        tally.same(f"rope_{dtype}", torch.equal(rotated, golden.tensor(f"rope/example_out_{dtype}")))


def pixels(golden: Golden, template: str, index: int, size: int, tally: Tally) -> torch.Tensor:
    video = golden.expected["videos"][index]
    strategy = "chat" if template == "chat" else "base"
    array = np.load(golden.folder / video["npz"])["frames"]
    times = [i / video["fps"] for i in range(len(array))]
    chosen = frames.choose_frames(times, video["fps"], strategy)  # type: ignore[arg-type]
    tally.same("frame_indices", chosen == video[f"frame_indices_{strategy}"])
    mp4 = (golden.folder / f"{Path(video['npz']).stem}.mp4").read_bytes()
    read = frames.read_frames(mp4, partial(frames.choose_frames, strategy=strategy))  # type: ignore[arg-type]
    tally.same("frames", np.array_equal(read, array[chosen]))
    values = frames.preprocess(torch.from_numpy(array[chosen]), size)
    key = f"{template}/video{index}/pixel_values"
    if (every := golden.tensor(key)) is not None:
        tally.close("pixel_values", values, every)
    if (ends := golden.tensor(f"{key}_frames_0_23")) is not None:
        tally.close("pixel_values", values[[0, 23]], ends)
    return values


def answers(golden: Golden, net: model.CogVLM2Video, dtype: str, tally: Tally) -> dict[str, Any]:
    """Compare every case; returns the answers equal of total, by template."""
    counts = {}
    for template in golden.templates:
        equal = sure = sure_equal = total = 0
        for index in range(len(golden.expected["videos"])):
            cases = golden.cases(template, index)
            if not cases:
                continue
            values = pixels(golden, template, index, net.config.vision.image_size, tally)
            features = net.encode(values)
            if (expected := golden.tensor(f"{template}/video{index}/features_{dtype}")) is not None:
                tally.close(f"features_{dtype}", features, expected)
            layout = _layout(golden, net, template, len(values), [case["query"] for case in cases])
            logits = net.answer([layout], [features])[0]
            for number, (case, row) in enumerate(zip(cases, logits, strict=True)):
                _ids(golden, case["key"], layout, number, tally)
                tally.close(f"logits_{dtype}/{template}", row, golden.tensor(f"{case['key']}/logits_{dtype}"))
                text = golden.tokenizer.decode([int(row.argmax())])
                same = (text == "yes") == case[dtype]["is_yes"]
                tally.same(f"first_token_{dtype}", int(row.argmax()) == case[dtype]["first_token_id"])
                is_sure = case[dtype]["margin_top1_top2"] >= 0.5
                total, equal = total + 1, equal + same
                sure, sure_equal = sure + is_sure, sure_equal + (is_sure and same)
        counts[template] = {"equal": equal, "total": total, "margin>=0.5": f"{sure_equal}/{sure}"}
    return counts


def _layout(
    golden: Golden, net: model.CogVLM2Video, template: Any, count: int, queries: list[str]
) -> sequence.Layout:
    config = net.config
    tokens, placeholder = config.vision.frame_tokens, config.pad_token_id
    before = sequence.prefix(golden.tokenizer, template, count, tokens, placeholder)
    return sequence.layout(golden.tokenizer, template, before, queries, config.max_position_embeddings)


def _ids(golden: Golden, key: str, layout: sequence.Layout, question: int, tally: Tally) -> None:
    """The prefix and one question are the sequence that the reference reads for it."""
    place = [*range(layout.prefix), *layout.question(question)]
    tokens = layout.tokens
    found = {"input_ids": tokens.ids, "position_ids": tokens.positions, "token_type_ids": tokens.vision}
    for name, values in found.items():
        if (expected := golden.tensor(f"{key}/{name}")) is not None:
            tally.same(name, [int(values[i]) for i in place] == expected.tolist())


def compare(folder: Path) -> dict[str, Any]:
    """All figures of one golden folder."""
    golden, tally = Golden(folder), Tally()
    sampling(golden, tally)
    decoding(golden, tally)
    found = {}
    for dtype, torch_dtype in DTYPES.items():
        net = model.load_reward_model(folder, torch_dtype, "cpu")
        rope(golden, net, dtype, tally)
        found[dtype] = answers(golden, net, dtype, tally)
    return {"folder": folder.name, **tally.report(), "answers": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(compare(parser.parse_args().folder)) + "\n")


if __name__ == "__main__":
    main()
