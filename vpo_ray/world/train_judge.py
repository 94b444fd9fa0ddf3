"""The world's judge: a Llama of 1.2 M parameters, trained from nothing on the lexicon's answers.

`python -m vpo_ray.world.train judge` makes the folder that `judge.model` names, with the judge's own short
templates beside the weights.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vpo_ray.engines  # noqa: F401  it quietens what transformers says of torchao
from vpo_ray.prompts.answers import AnswerError
from vpo_ray.stages.judge import parse_judgement, parse_prompt
from vpo_ray.world import judge_texts, lexicon
from vpo_ray.world.scene import scenes

logger = logging.getLogger(__name__)

PAIRS = 40_000
STEPS = 1_000
TOKENS = 4_096  # of a batch, the padding among them
POOL = 1_024  # examples that are sorted by length before they are cut into batches
LEARNING_RATE = 3e-3
LONGEST = 640  # tokens of a training example
VOCABULARY = 2560

# Fixed pieces, words with a space before them, escapes of JSON, numbers by the digit, marks in a row.
_SPLIT = "|".join(
    [
        *map(re.escape, sorted(judge_texts.FIXED, key=len, reverse=True)),
        r"\\(?:u[0-9a-f]{4}|.)| ?\p{L}+(?:-\p{L}+)*| ?\p{N}| ?[^\s\p{L}\p{N}\\]+|\s",
    ]
)
_BEGIN, _END, _PAD = "<|begin|>", "<|end|>", "<|pad|>"
_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- message['content'] | trim + eos_token }}{%- endfor %}"
)


def train(
    folder: str | Path,
    minutes: float | None = None,
    steps: int = STEPS,
    pairs: int = PAIRS,
    measured: int = 400,
) -> dict[str, Any]:
    """Train a judge from fixed seeds into a folder; the same on every run of a machine without `minutes`.

    Args:
        minutes: stop after so many minutes of training, where that is before the last step.
        measured: pairs of its figures.

    Returns:
        Its figures; see `measure`.
    """
    import torch
    import torch.nn.functional as F

    begun = time.monotonic()
    folder = Path(folder)
    torch.set_num_threads(1)  # the sums are the same on any number of cores
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    kept = scenes(held_out=False)
    asked = [e for _ in range(pairs) for e in judge_texts.examples(*judge_texts.pair(kept, rng))]
    tokenizer = make_tokenizer([text for example in asked[:10_000] for text in example])
    encoded = [e for e in encode_examples(tokenizer, asked) if len(e[0]) <= LONGEST]
    tokens = sum(len(ids) for ids, _ in encoded)
    logger.info("%d examples of %.0f tokens", len(encoded), tokens / len(encoded))
    model = make_model(tokenizer)
    optimizers = _optimizers(model)
    losses: list[float] = []
    started = time.monotonic()
    for step, (ids, starts) in zip(range(steps), batches(encoded, tokenizer.pad_token_id, rng), strict=False):
        spent = 0.0 if minutes is None else (time.monotonic() - started) / 60 / minutes
        progress = max(step / steps, spent)
        if progress >= 1:
            break
        answers = torch.arange(ids.shape[1])[None] >= starts[:, None]
        answers &= ids != tokenizer.pad_token_id
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[answers[:, 1:]]
            loss = F.cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][answers[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * min(1.0, 1.02 - progress)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            logger.info("step %d of %d: loss %.4f", step + 1, steps, np.mean(losses[-50:]))
        if (step + 1) % 250 == 0:
            save_judge(model, tokenizer, folder)
    save_judge(model, tokenizer, folder)
    took = {"minutes": round((time.monotonic() - begun) / 60, 1), "steps": len(losses)}
    return {
        **took,
        "loss": [round(losses[0], 3), round(float(np.mean(losses[-20:])), 4)],
        **measure(folder, measured),
    }


def measure(folder: str | Path, count: int = 400, seed: int = 1) -> dict[str, Any]:
    """How a judge does on held-out pairs, with greedy decoding.

    Returns:
        `n` pairs; the share whose verdict is the lexicon's, `agreement`, and `by_verdict`; the share whose
        missing details are, too, `details`; and of the `repairs` of the others the share that the lexicon
        calls aligned, `repaired`.
    """
    rng, held_out = np.random.default_rng(seed), scenes(held_out=True)
    pairs = [judge_texts.pair(held_out, rng) for _ in range(count)]
    truth = [judge_texts.judged(*pair) for pair in pairs]
    judge = Greedy(folder)
    found = [_parsed(text) for text in judge(judge_texts.critique_request(*pair) for pair in pairs)]
    right = [f["verdict"] == t["verdict"] for f, t in zip(found, truth, strict=True)]
    details = [r and f["missing"] == t["missing"] for r, f, t in zip(right, found, truth, strict=True)]
    of = Counter(t["verdict"] for t in truth)
    agreed = Counter(t["verdict"] for t, r in zip(truth, right, strict=True) if r)
    wrong = [(p, f) for p, f in zip(pairs, found, strict=True) if f["verdict"] not in ("aligned", "none")]
    repairs = [_prompt(text) for text in judge(judge_texts.refine_request(*p, f) for p, f in wrong)]
    aligned = [lexicon.verdict(p[0], text) == "aligned" for (p, _), text in zip(wrong, repairs, strict=True)]
    looks = Counter(lexicon.read(text).get("look") or "unsaid" for text in repairs)
    return {
        "n": count,
        "agreement": _share(right),
        "by_verdict": {verdict: [agreed[verdict], n] for verdict, n in sorted(of.items())},
        "details": _share(details),
        "repairs": len(repairs),
        "repaired": _share(aligned),
        "looks": dict(sorted(looks.items())),
    }


class Greedy:
    """The likeliest answers of a judge in a folder, without a schema to hold it to."""

    def __init__(self, folder: str | Path) -> None:
        import torch
        from transformers import AutoTokenizer, LlamaForCausalLM

        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def __call__(self, requests: Iterable[str], size: int = 50) -> list[str]:
        asked = list(requests)
        parts = (asked[start : start + size] for start in range(0, len(asked), size))
        return [answer for part in parts for answer in self._answers(part)]

    def _answers(self, requests: Sequence[str]) -> list[str]:
        chats = [[{"role": "user", "content": request}] for request in requests]
        given = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        made = self.model.generate(**given, max_new_tokens=200, do_sample=False)
        return self.tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Whole words as tokens: the lexicon's, and the most frequent of these texts; the rest by the byte."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    known = [*lexicon.VOCABULARY, *sorted(lexicon.UNSAFE_WORDS)]
    words = [f"{space}{form}" for word in known for form in (word, word.capitalize()) for space in ("Ġ", "")]
    frequent = sorted(counts, key=lambda piece: (-counts[piece], piece))
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *frequent])
    kept = itertools.islice(pieces, VOCABULARY - 3)
    # No merges: a word that is not in the vocabulary is no word that the judge knows.
    bpe = models.BPE(vocab={piece: i for i, piece in enumerate(kept)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (_BEGIN, _END, _PAD)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_PAD,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = _TEMPLATE
    made.model_max_length = 2048
    return made


def make_model(tokenizer: Any) -> Any:
    """A Llama with random weights for this tokenizer."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
        **tokens,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**tokens)
    return model


def encode_examples(tokenizer: Any, examples: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Token ids of each chat with its answer, and where the answer begins."""
    chat = [{"role": "user", "content": "{}"}]
    form = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    asked = tokenizer([form.replace("{}", text) for text, _ in examples], add_special_tokens=False)[
        "input_ids"
    ]
    said = tokenizer([answer for _, answer in examples], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [([*ask, *answer, end], len(ask)) for ask, answer in zip(asked, said, strict=True)]


def batches(
    encoded: Sequence[tuple[list[int], int]], pad: int, rng: np.random.Generator
) -> Iterator[tuple[Any, Any]]:
    """Without end: token ids padded at the right, and where each answer begins."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    while True:
        order = rng.permutation(len(encoded)).tolist()
        for start in range(0, len(order), POOL):
            ready: list[list[int]] = [[]]
            for i in sorted(order[start : start + POOL], key=lambda i: len(encoded[i][0])):
                if (len(ready[-1]) + 1) * len(encoded[i][0]) > TOKENS:
                    ready.append([])
                ready[-1].append(i)
            for k in rng.permutation(len(ready)):
                ids = [torch.tensor(encoded[i][0]) for i in ready[k]]
                starts = torch.tensor([encoded[i][1] for i in ready[k]])
                yield pad_sequence(ids, batch_first=True, padding_value=pad), starts


def save_judge(model: Any, tokenizer: Any, folder: Path) -> None:
    """The folder that a recipe's `judge.model` names, the weights in half precision, and its templates."""
    import torch
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.detach().to(torch.float16) for name, value in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.float16)
    copy.load_state_dict(half)
    copy.generation_config = model.generation_config
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "critique.txt").write_text(judge_texts.CRITIQUE + "\n", "utf-8")
    (folder / "refine.txt").write_text(judge_texts.REFINE + "\n", "utf-8")


def _optimizers(model: Any) -> list[Any]:
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _parsed(text: str) -> dict[str, Any]:
    try:
        return vars(parse_judgement(text))
    except AnswerError:
        return {"verdict": "none", "critique": "", "missing": [], "added": []}


def _prompt(text: str) -> str:
    try:
        return parse_prompt(text)
    except AnswerError:
        return ""


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / max(len(right), 1), 4)
