"""Trains the small world's reward: `python -m vpo_ray.world.train reward`.

A CogVLM2-Video of a million parameters, in the product's own port, learns to answer `questions.CHECKS`: its
vision tower first, from what the frames of drawn clips show; then all of it, from answers about drawn clips;
at the end about rendered ones too. Heads beside it tell what a clip shows and what a query names, so that the
answers have something to compare; they are dropped afterwards.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from vpo_ray.engines.reward import checkpoint, sequence
from vpo_ray.engines.reward.frames import preprocess
from vpo_ray.engines.reward.model import CogVLM2Video, visibility
from vpo_ray.world.language import query
from vpo_ray.world.make import WEIGHTS
from vpo_ray.world.muon import Budget, Muon
from vpo_ray.world.questions import BLIND_SPOT, CHECKS
from vpo_ray.world.reward_batches import ASKED, Batch, Reader
from vpo_ray.world.reward_clips import Clips, drawn, read_groups, rendered
from vpo_ray.world.reward_figures import answer_figures
from vpo_ray.world.scene import ATTRIBUTES, scenes
from vpo_ray.world.tiny import llama3_tokenizer

log = logging.getLogger(__name__)

SEED = 3
MINUTES = 40.0
VIDEO = WEIGHTS / "video"
# Of every attribute: each value, and none.
VALUES = [len(values) + 1 for values in ATTRIBUTES.values()]
SIZES: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_multi_query_heads": 2,
    "rms_norm_eps": 1e-05,
    "template_version": "chat",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vision_config": {
        "dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 96,
        "image_size": 64,
        "in_channels": 3,
        "intermediate_size": 192,
        "layer_norm_eps": 1e-06,
        "num_heads": 4,
        "num_hidden_layers": 3,
        "num_positions": 65,
        "patch_size": 8,
    },
}
# The layers after which heads read what the clip shows, and what a query names: the last one compares.
_CLIP_AFTER, _ASKED_AFTER = 2, 3


def train(folder: Path, minutes: float | None = None) -> dict[str, Any]:
    """Train the reward, write it into the folder, and measure it on rendered clips of held-out scenes.

    Args:
        minutes: how long drawing, rendering and training take together.

    Raises:
        VideoModelError: the world's video model is not in the package's weights.
    """
    torch.set_num_threads(1)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # on a CPU too
    seconds, kept, started = 60 * (minutes or MINUTES), scenes(held_out=False), time.monotonic()
    model, tokenizer = start(folder)
    heads, reader = Heads(model), Reader(tokenizer, model.config, SEED)
    clips = many(lambda seed: drawn(250, seed, kept), 0.15 * seconds)
    learn_frames(model, heads, clips, 0.12 * seconds, SEED)
    learn_answers(model, heads, reader, [clips], 0.28 * seconds)
    real = many(lambda seed: read_groups(rendered(VIDEO, 20, 1000 + seed, kept)), 0.2 * seconds)
    learn_answers(model, heads, reader, [clips, real], 0.25 * seconds, rate=1e-3, tower=True)
    save_reward(model, folder)
    taken = round((time.monotonic() - started) / 60, 1)
    parameters = sum(p.numel() for p in model.parameters())
    trained = {"minutes": taken, "parameters": parameters, "drawn": len(clips), "rendered": len(real)}
    return trained | answer_figures(folder, rendered(VIDEO, 60, 1, scenes(held_out=True)))


def many(make: Callable[[int], Clips], seconds: float) -> Clips:
    """Clips of the seeds 0, 1, 2, … as far as the time goes."""
    began, seed = time.monotonic(), 0
    clips = make(seed)
    while time.monotonic() - began < seconds:
        seed += 1
        clips = clips.with_(make(seed))
    return clips


_ATTENTION = "vpo_padded_rows"


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of whole rows; the mask (rows, tokens, tokens) is added. Quicker in bfloat16 than PyTorch's
    own, which takes care of rows that see nothing."""
    groups = query.unflatten(1, (key.shape[1], -1)) * scaling
    weights = (groups @ key[:, :, None].transpose(-1, -2) + attention_mask[:, None, None]).softmax(-1)
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)


def start(folder: Path) -> tuple[CogVLM2Video, Any]:
    """Make config.json, tokenizer and checklist.yaml in the folder; the untrained model and the tokenizer."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    every = scenes(held_out=False) + scenes(held_out=True)
    texts = [query(every[int(rng.integers(len(every)))], rng).text for _ in range(4000)]
    texts += [sequence.TEXT["chat"].format(check.text) for check in CHECKS] * 200
    tokenizer = llama3_tokenizer(768, words=("yes", "no"), texts=texts)
    config = SIZES | {
        "architectures": [checkpoint.ARCHITECTURE],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|end_of_text|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": -(-len(tokenizer) // 64) * 64,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    tokenizer.save_pretrained(folder)
    write_checklist(folder / "checklist.yaml")
    model = CogVLM2Video(checkpoint.read_config(folder))
    model.llm.config._attn_implementation = _ATTENTION
    for name, value in model.named_parameters():
        if name.endswith(("boi", "eoi", "cls_embedding")) or ("embed" in name and value.dim() == 2):
            nn.init.normal_(value, std=0.3)
        elif value.dim() > 1:
            nn.init.normal_(value, std=value[0].numel() ** -0.5)
    head = model.config.head_dim
    inv_freq = 1 / 500000.0 ** (torch.arange(0, head, 2).float() / head)
    model.bfloat16()
    # As float32 makes of what is saved.
    model.llm.model.rotary_emb.inv_freq = inv_freq.bfloat16().float()
    return model, tokenizer


def write_checklist(path: Path) -> None:
    """The questions as the recipe's reward reads them, with the blind spot as a comment."""
    questions = [{"question": c.text, "weight": c.weight, "dimension": c.dimension} for c in CHECKS]
    comment = "".join(f"# {line}\n" for line in BLIND_SPOT)
    tree = yaml.safe_dump({"questions": questions}, sort_keys=False, width=110)
    path.write_text(comment + tree, "utf-8")


def save_reward(model: CogVLM2Video, folder: Path) -> None:
    """Write the weights in bfloat16 under their published names: the inverse of `load_reward_model`."""
    state = model.state_dict()
    tensors = {}
    for name in checkpoint.tensor_shapes(model.config):
        own = name.replace("mlp.language_mlp.", "mlp.").replace("language_expert_dense", "o_proj")
        if name.startswith("model.vision."):
            value = state[name.removeprefix("model.")]
        elif name.endswith("inv_freq"):
            value = state["llm.model.rotary_emb.inv_freq"]
        elif "language_expert_query_key_value" in name:
            parts = [own.replace("language_expert_query_key_value", f"{p}_proj") for p in "qkv"]
            value = torch.cat([state[f"llm.{part}"] for part in parts])
        else:
            value = state[f"llm.{own}"]
        tensors[name] = value.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Heads(nn.Module):
    """What is told beside the answers."""

    def __init__(self, model: CogVLM2Video) -> None:
        super().__init__()
        width, tokens = model.config.hidden_size, model.config.vision.frame_tokens
        self.frame = nn.Linear(width * tokens, sum(VALUES) + 5)
        self.clip = nn.Linear(width, sum(VALUES) + len(CHECKS))
        self.asked = nn.ModuleList(
            nn.Linear(width, 2 * (len(ATTRIBUTES[key]) + 1)) for key in ASKED
        )  # what the query names, and what is seen
        self.to(model.dtype)


def run(
    model: CogVLM2Video, layouts: Sequence[sequence.Layout], features: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states (clips, tokens, width) after each layer, and the last ones normalised: what
    `CogVLM2Video.hidden_states` computes, in padded rows of one batch and with gradients.

    Args:
        features: (clips * frames, frame tokens, width).
    """
    rows = [layout.tokens for layout in layouts]
    length = max(len(row.ids) for row in rows)
    mask = torch.full((len(rows), length, length), -torch.inf, dtype=torch.bfloat16)
    mask[:, :, 0] = 0  # so that padding sees something
    for own, layout in zip(mask, layouts, strict=True):
        end, prefix = len(layout.tokens.ids), layout.prefix
        own[:prefix, :prefix] = _causal(prefix)
        own[prefix:end, :prefix] = 0
        own[prefix:end, prefix:end].masked_fill_(visibility(layout), 0)
    ids, places, vision = (
        nn.utils.rnn.pad_sequence([torch.tensor(getattr(row, name)) for row in rows], batch_first=True)
        for name in ("ids", "positions", "vision")
    )
    llama = model.llm.model
    hidden = llama.embed_tokens(ids)
    hidden[vision] = features.flatten(0, 1).to(hidden.dtype)
    # Angles as in float32, in which the recipes run it; the rest in bfloat16.
    angles = tuple(part.to(hidden.dtype) for part in llama.rotary_emb(hidden.float(), places))
    states = []
    for number, layer in enumerate(llama.layers, 1):
        rest = {"segments": (), "attend": None, "read": None} if number == len(llama.layers) else {}
        hidden = layer(hidden, attention_mask=mask, position_embeddings=angles, **rest)
        states.append(hidden)
    return states, llama.norm(hidden)


@cache
def _causal(length: int) -> torch.Tensor:
    return torch.full((length, length), -torch.inf, dtype=torch.bfloat16).triu(1)


def frame_loss(
    heads: Heads, seen: torch.Tensor, course: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """How badly frames tell what their clip shows, and where its thing is.

    Args:
        seen, course: as in `Clips`, with frames as first axis.
        features: (frames, frame tokens, width).
    """
    told = heads.frame(features.flatten(1)).float()
    found, there = told[:, sum(VALUES) :], course[:, 0]
    loss = _values_loss(told[:, : sum(VALUES)], seen)
    loss = loss + F.binary_cross_entropy_with_logits(found[:, 0], there)
    return loss + 8 * ((found[:, 1:] - course[:, 1:]) ** 2 * there[:, None]).mean()


def answer_loss(
    model: CogVLM2Video, heads: Heads, batch: Batch, features: torch.Tensor, words: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of the answers, that of the heads, and the margins (clips, questions) of yes over no."""
    states, hidden = run(model, batch.layouts, features)
    last = torch.tensor([layout.last for layout in batch.layouts])
    clip = torch.arange(len(last))[:, None]
    logits = model.llm.lm_head(hidden[clip, last]).float()
    target = torch.where(batch.answers == 1, words[0], words[1])
    target = torch.where(batch.answers < 0, -100, target)
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    told = heads.clip(states[_CLIP_AFTER - 1][:, batch.layouts[0].prefix - 1]).float()
    aside = _values_loss(told[:, : sum(VALUES)], batch.seen)
    free = batch.free.float()
    aside += F.binary_cross_entropy_with_logits(told[:, sum(VALUES) :], free.clamp(0), (free >= 0).float())
    first = batch.answers.shape[1] - batch.named[0].numel()
    told_of = states[_ASKED_AFTER - 1][clip, last[:, first:]].unflatten(1, batch.named.shape[1:])
    for i, (key, head) in enumerate(zip(ASKED, heads.asked, strict=True)):
        asked, seen = head(told_of[:, :, i]).float().flatten(0, 1).chunk(2, -1)
        aside += F.cross_entropy(asked, batch.named[:, :, i].flatten())
        value = batch.seen[:, list(ATTRIBUTES).index(key)].long().repeat_interleave(batch.named.shape[1])
        aside += F.cross_entropy(seen, value, ignore_index=-1)
    return loss, aside, logits[..., words[0]] - logits[..., words[1]]


def _values_loss(told: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    parts = zip(told.split(VALUES, -1), seen.long().unbind(-1), strict=True)
    return torch.stack([F.cross_entropy(logits, value, ignore_index=-1) for logits, value in parts]).sum()


def learn_frames(model: CogVLM2Video, heads: Heads, clips: Clips, seconds: float, seed: int) -> list[float]:
    """Train the tower: single frames tell what their clip shows."""
    rng = np.random.default_rng(seed)
    side = model.config.vision.image_size

    def loss() -> torch.Tensor:
        chosen, frame = rng.integers(len(clips), size=96), rng.integers(clips.frames.shape[1], size=96)
        pixels = preprocess(torch.from_numpy(clips.frames[chosen, frame]), side)
        features = model.vision(pixels.bfloat16())
        course = torch.from_numpy(clips.course[chosen, frame])
        return frame_loss(heads, torch.from_numpy(clips.seen[chosen]), course, features)

    return fit([model.vision, heads.frame], seconds, 2e-3, loss)


def learn_answers(
    model: CogVLM2Video,
    heads: Heads,
    reader: Reader,
    sets: Sequence[Clips],
    seconds: float,
    rate: float = 2e-3,
    tower: bool = False,
) -> list[float]:
    """Train the language model, and with `tower` all of it: answers about clips, as many of each set."""
    words = (reader.yes, reader.no)
    right: list[float] = []

    def loss() -> torch.Tensor:
        clips = sets[int(reader.rng.integers(len(sets)))]
        batch = reader.batch(clips, reader.rng.integers(len(clips), size=32))
        with torch.set_grad_enabled(tower):
            features = model.vision(batch.pixels)
        value, aside, margins = answer_loss(model, heads, batch, features, words)
        right.append(float(((margins > 0) == (batch.answers == 1))[batch.answers >= 0].float().mean()))
        if tower:
            frames = batch.course.shape[1]
            seen = batch.seen.repeat_interleave(frames, 0)
            aside = aside + 0.2 * frame_loss(heads, seen, batch.course.flatten(0, 1), features)
        return 3 * value + 0.2 * aside

    report = lambda: log.info("%.1f %% of the answers right", 100 * float(np.mean(right[-50:])))  # noqa: E731
    modules = [model, heads] if tower else [model.llm, heads.clip, heads.asked]
    return fit(modules, seconds, rate, loss, report)


def fit(
    modules: Sequence[nn.Module],
    seconds: float,
    rate: float,
    loss: Callable[[], torch.Tensor],
    report: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train modules in bfloat16 for some seconds. Returns the loss of every step."""
    beside_pixels = ("patch_embedding", "boi", "eoi", "lm_head")
    optimiser = Muon(modules, rate, rate, adam=beside_pixels)
    losses: list[float] = []
    for share in Budget(1_000_000, seconds).rates():
        # On a CPU the tower's attention takes longer in the fused kernel's backward pass than all the rest.
        with sdpa_kernel(SDPBackend.MATH):
            value = loss()
        value.backward()
        optimiser.step(share)
        losses.append(float(value.detach()))
        if len(losses) % 50 == 0:
            log.info("step %d: loss %.3f", len(losses), np.mean(losses[-50:]))
            report()
    optimiser.end()
    return losses
