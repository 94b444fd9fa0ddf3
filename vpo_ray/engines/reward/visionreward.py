"""VisionReward: CogVLM2-Video answers a checklist about a video, all questions in one pass.

A video is decoded once, its frames are encoded once, and one forward pass gives every question's answer in
the logits of its last token. The reference does each of these 29 times.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from vpo_ray.engines.reward import QuestionAnswer, RewardError, Scored, checklist, frames, model, sequence
from vpo_ray.engines.reward.checkpoint import CheckpointError, model_folder
from vpo_ray.prompts.policy_prompt import control_tokens, neutralise
from vpo_ray.recipe import Reward

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """How logits become an answer.

    Args:
        yes, no: token ids that count as yes and as no.
        kind: `argmax`: yes when the most likely token of the whole vocabulary is one for yes, as
            the reference does; `margin`: yes when yes is more likely than no.
    """

    yes: list[int]
    no: list[int]
    kind: str

    def decide(self, logits: torch.Tensor) -> tuple[list[bool], list[float], int]:
        """Answers and P(yes) among yes and no for logits (questions, vocabulary), and the number of questions
        whose most likely token is neither."""
        margin = logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)
        top = logits.argmax(-1)
        is_yes = torch.isin(top, torch.tensor(self.yes, device=top.device))
        is_no = torch.isin(top, torch.tensor(self.no, device=top.device))
        answers = is_yes if self.kind == "argmax" else margin > 0
        return answers.tolist(), margin.sigmoid().tolist(), int((~(is_yes | is_no)).sum())


class VisionReward:
    """The published reward model. Built by `build`."""

    def __init__(self, settings: Reward) -> None:
        self.settings = settings
        self.checklist = checklist.load_checklist(settings.checklist)
        folder = model_folder("reward.model", settings.model)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.load_reward_model(
            folder, getattr(torch, settings.dtype), device, settings.attention
        )
        self.tokenizer = _tokenizer(folder)
        self.control_tokens = control_tokens(self.tokenizer)
        self.pick = partial(frames.choose_frames, strategy=settings.frame_strategy)
        self.rule = Rule(
            [_token(self.tokenizer, word) for word in settings.yes_tokens],
            [_token(self.tokenizer, word) for word in settings.no_tokens],
            settings.rule,
        )

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """Score videos for their original queries; see `RewardModel.score`."""
        try:
            return self._score(videos, queries)
        except torch.OutOfMemoryError as error:
            if len(videos) == 1:
                return [RewardError(f"out of memory with this video alone: {error}")]
        log.warning("out of memory with %d videos at once, continuing one by one", len(videos))
        torch.cuda.empty_cache()
        return [self.score([v], [q])[0] for v, q in zip(videos, queries, strict=True)]

    def _score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        return [r if isinstance(r, RewardError) else self._scored(r) for r in self.logits(videos, queries)]

    def _scored(self, logits: torch.Tensor) -> Scored | RewardError:
        """As `read`; what is no number would read as no to every question."""
        if not logits.isfinite().all():
            return RewardError(
                "the model's answers are no numbers: its weights are damaged, or reward.dtype "
                f"{self.settings.dtype} is too narrow for them"
            )
        return self.read(logits)

    def logits(
        self, videos: Sequence[bytes | str], queries: Sequence[str]
    ) -> list[torch.Tensor | RewardError]:
        """For each video the logits (questions, vocabulary) of the answers, or the error."""
        results: dict[int, torch.Tensor | RewardError] = {}
        pixels: dict[int, torch.Tensor] = {}
        layouts: dict[int, sequence.Layout] = {}
        for i, (video, query) in enumerate(zip(videos, queries, strict=True)):
            try:
                chosen = torch.from_numpy(frames.read_frames(video, self.pick)).to(self.model.device)
                layouts[i] = self.layout(len(chosen), query)
            except RewardError as error:
                results[i] = error
            else:
                pixels[i] = frames.preprocess(chosen, self.model.config.vision.image_size)
        if layouts:
            counts = [len(p) for p in pixels.values()]
            features = self.model.encode(torch.cat(list(pixels.values()))).split(counts)
            logits = self.model.answer(list(layouts.values()), features)
            results |= dict(zip(layouts, logits, strict=True))
        return [results[i] for i in range(len(videos))]

    def layout(
        self, frame_count: int, query: str, questions: Sequence[checklist.Question] | None = None
    ) -> sequence.Layout:
        """The row of tokens with the questions (default: the whole checklist) about a video."""
        s, config = self.settings, self.model.config
        tokens, placeholder = config.vision.frame_tokens, config.pad_token_id
        before = sequence.prefix(self.tokenizer, s.template, frame_count, tokens, placeholder)
        safe = neutralise(query, self.control_tokens)
        asked = [question.ask(safe) for question in questions or self.checklist.questions]
        return sequence.layout(self.tokenizer, s.template, before, asked, config.max_position_embeddings)

    def read(self, logits: torch.Tensor) -> Scored:
        """The result of one video from its logits (questions, vocabulary)."""
        yes, probabilities, neither = self.rule.decide(logits)
        score, dimensions = self.checklist.score(yes, self.settings.convention)
        answers = [
            QuestionAnswer(i, y, p) for i, (y, p) in enumerate(zip(yes, probabilities, strict=True), 1)
        ]
        return Scored(answers, dimensions, score, neither)


def build(settings: Reward) -> VisionReward:
    """Load the checkpoint and checklist that a recipe names.

    Raises:
        CheckpointError: see `load_reward_model`; also a tokenizer that does not fit.
        ChecklistError: see `load_checklist`.
    """
    return VisionReward(settings)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json; the reward model reads a fast tokenizer only")
    # The plain class, because AutoTokenizer would ask about the remote code in config.json.
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _token(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise CheckpointError(
            f"the tokenizer splits {word!r} into {len(ids)} tokens; yes_tokens and no_tokens are single ones"
        )
    return ids[0]
