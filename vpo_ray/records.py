"""The records that flow through the loop: schemas, ids and seeds.

A row starts as a query, becomes K candidates, and grows through the stages; nothing is joined by position.
Ids and seeds are functions of content, never of time or order, so that a recipe gives the same rows on 1
worker or 100, and a resumed run adds no duplicate.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

Row = dict[str, Any]
Verdict = Literal["aligned", "unsafe", "imprecise", "refusal"]
VERDICTS: tuple[Verdict, ...] = ("aligned", "unsafe", "imprecise", "refusal")
SPLITS = ("sft", "dpo", "eval")

# The name of a query's image in the run's images/, `<sha256>.<kind>`; null: the query has none.
_IMAGE = pa.field("image", pa.string())
# Generator flags removed from a query: see flags.py.
FLAGS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))

QUERY = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        _IMAGE,
        pa.field("source", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("unsafe", pa.bool_()),  # null: not labelled
        pa.field("flags", FLAGS),  # null: not looked for
    ]
)

DROPPED = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("excerpt", pa.string()),
    ]
)

_SECONDS = pa.struct([(stage, pa.float64()) for stage in ("sample", "judge", "render", "score")])
# An LLM's tokens for a row, and their cost at an endpoint (in the currency of its prices).
TOKENS = pa.struct([("prompt", pa.int64()), ("completion", pa.int64()), ("cost", pa.float64())])
_USAGE = pa.struct([(stage, TOKENS) for stage in ("sample", "judge")])
_ANSWER = pa.struct([("question", pa.int32()), ("yes", pa.bool_()), ("probability", pa.float32())])
_DIMENSION = pa.struct([("name", pa.string()), ("score", pa.float64())])
_SCORE_COLUMNS = [
    pa.field("reward", pa.string()),
    pa.field("answers", pa.list_(_ANSWER)),
    pa.field("dimensions", pa.list_(_DIMENSION)),
    pa.field("score", pa.float64()),
]

# The judge's verdict on a prompt, with the details of the query that it lacks and adds; for a misaligned
# prompt, the refined one, with the fault of its form or its own verdict.
_REVIEW = [
    pa.field("verdict", pa.string()),
    pa.field("critique", pa.string()),
    pa.field("missing", pa.list_(pa.string())),
    pa.field("added", pa.list_(pa.string())),
    pa.field("refined_prompt", pa.string()),
    pa.field("refined_fault", pa.string()),
    pa.field("refined_verdict", pa.string()),
    pa.field("refined_critique", pa.string()),
    pa.field("refined_missing", pa.list_(pa.string())),
    pa.field("refined_added", pa.list_(pa.string())),
]

# What is asked of a prompt beyond the query: the profile's name, and its conditions as JSON; see
# `prompts.conditions`. Null where nothing is.
_PROFILE = [pa.field("profile", pa.string()), pa.field("conditions", pa.string())]

# One row per candidate. Every stage table has this schema; the columns of later stages are null.
FEEDBACK = pa.schema(
    [
        # sample
        pa.field("candidate_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        _IMAGE,
        pa.field("unsafe", pa.bool_()),
        pa.field("k", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("policy", pa.string()),
        *_PROFILE,
        pa.field("prompt", pa.string()),
        pa.field("unmet", pa.list_(pa.string())),  # conditions that the prompt does not meet
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        *_REVIEW,
        # render
        pa.field("video_key", pa.string()),
        pa.field("video_uri", pa.string()),
        pa.field("video_seed", pa.int64()),
        pa.field("frames", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("text_cut", pa.int32()),  # tokens of the prompt that the text encoder did not take
        pa.field("skipped", pa.string()),  # why an aligned prompt was not rendered
        # score; then the same columns of every further reward by its name
        *_SCORE_COLUMNS,
        pa.field("more_rewards", pa.list_(pa.struct([pa.field("name", pa.string()), *_SCORE_COLUMNS]))),
        # every stage
        pa.field("seconds", _SECONDS),
        pa.field("usage", _USAGE),
        pa.field("error", pa.string()),
        pa.field("error_stage", pa.string()),
    ]
)

# One row per query of the sft split: the whole trail of its SFT example. `target` is the prompt to
# learn, the draft or its refinement, whichever is aligned; without one, `fault` says why.
DRAFT = pa.schema(
    [
        pa.field("draft_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        _IMAGE,
        pa.field("unsafe", pa.bool_()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("model", pa.string()),
        *_PROFILE,
        pa.field("examples", pa.list_(pa.string())),  # query ids of the examples shown
        pa.field("prompt", pa.string()),
        *_REVIEW,
        pa.field("target", pa.string()),
        pa.field("fault", pa.string()),
        pa.field("seconds", pa.struct([("draft", pa.float64())])),
        pa.field("usage", pa.struct([("draft", TOKENS)])),
        pa.field("error", pa.string()),
        pa.field("error_stage", pa.string()),
    ]
)

# A query that the judge labels as unsafe or not; without a label, `error` says why.
LABEL = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        _IMAGE,
        pa.field("unsafe", pa.bool_()),
        pa.field("reason", pa.string()),
        pa.field("seconds", pa.struct([("label", pa.float64())])),
        pa.field("usage", pa.struct([("label", TOKENS)])),
        pa.field("error", pa.string()),
        pa.field("error_stage", pa.string()),
    ]
)

# What an LLM prefers of two prompts, or of two videos by their keys: `a`, which it is shown first, or `b`.
PREFERENCE = pa.schema(
    [
        pa.field("preference_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("a", pa.string(), nullable=False),
        pa.field("b", pa.string(), nullable=False),
        pa.field("a_uri", pa.string()),
        pa.field("b_uri", pa.string()),
        pa.field("answer", pa.string()),  # a | b | tie; null: none, see error
        pa.field("raw", pa.string()),
        pa.field("seconds", pa.struct([("prefer", pa.float64())])),
        pa.field("usage", pa.struct([("prefer", TOKENS)])),
        pa.field("error", pa.string()),
        pa.field("error_stage", pa.string()),
    ]
)

# What an LLM is shown of a query's evolution in one round, and what it wrote: one row a query and round.
# `shown` holds the query itself, where it has a score, and the best prompts; `known` all texts that are no
# new prompt; `skipped` of a written prompt says why no video is made of it.
OFFSPRING = pa.schema(
    [
        pa.field("ask_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        _IMAGE,
        pa.field("unsafe", pa.bool_()),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("wanted", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("model", pa.string()),
        pa.field(
            "shown",
            pa.list_(
                pa.struct(
                    [
                        pa.field("prompt_id", pa.string()),
                        pa.field("prompt", pa.string()),
                        pa.field("fitness", pa.float64()),
                        pa.field("dimensions", pa.list_(_DIMENSION)),
                    ]
                )
            ),
        ),
        pa.field("known", pa.list_(pa.string())),
        pa.field("written", pa.list_(pa.struct([("prompt", pa.string()), ("skipped", pa.string())]))),
        pa.field("seconds", pa.struct([("evolve", pa.float64())])),
        pa.field("usage", pa.struct([("evolve", TOKENS)])),
        pa.field("error", pa.string()),
        pa.field("error_stage", pa.string()),
    ]
)

# The prompts of a query's evolution: the query itself in round 0, then what each round wrote. `dimensions`
# are raw: `reward` and `reward.dimension`, and so for each further reward by its name. The row of round 0
# says why the evolution ended and, where none of the prompts is the query's SFT target, why. What a gate of
# the fitness leaves out has no fitness.
EVOLUTION = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        _IMAGE,
        pa.field("unsafe", pa.bool_()),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("k", pa.int32(), nullable=False),  # place among all prompts of the query
        pa.field("parent_ids", pa.list_(pa.string())),  # the prompts that the LLM was shown
        pa.field("prompt", pa.string()),
        pa.field("verdict", pa.string()),
        pa.field("critique", pa.string()),
        pa.field("skipped", pa.string()),  # why no video was made of it
        pa.field("seed", pa.int64()),  # of the video: one for all prompts of a query
        pa.field("video_key", pa.string()),
        pa.field("video_uri", pa.string()),
        pa.field("dimensions", pa.list_(_DIMENSION)),
        pa.field("score", pa.float64()),
        pa.field("fitness", pa.float64()),
        pa.field("refused", pa.string()),  # the gate or threshold that its video does not pass
        pa.field("target", pa.bool_()),
        pa.field("ended", pa.string()),
        pa.field("fault", pa.string()),
        pa.field("error", pa.string()),
        pa.field("error_stage", pa.string()),
    ]
)

PAIR = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        _IMAGE,
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # text | video
        pa.field("margin", pa.float64()),
        pa.field("chosen_id", pa.string(), nullable=False),
        pa.field("rejected_id", pa.string(), nullable=False),
        *_PROFILE,
    ]
)

# All candidates of a query that have a reward, in the order of their k. An advantage is a reward compared
# with those of the group.
GROUP = pa.schema(
    [
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        _IMAGE,
        pa.field("candidate_ids", pa.list_(pa.string()), nullable=False),
        pa.field("prompts", pa.list_(pa.string()), nullable=False),
        pa.field("rewards", pa.list_(pa.float64()), nullable=False),
        pa.field("advantages", pa.list_(pa.float64()), nullable=False),
        *_PROFILE,
    ]
)

# A query may have several rows, one for each prompt and each profile.
SFT = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        _IMAGE,
        pa.field("prompt", pa.string(), nullable=False),
        *_PROFILE,
    ]
)


def normalise(text: str) -> str:
    """NFC, line ends as `\\n`, no white space around. Raises UnicodeEncodeError on lone surrogates."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").strip()
    text.encode("utf-8")
    return text


def content_id(*parts: Any, digits: int = 32) -> str:
    """Hex digest of JSON-able parts; equal parts give equal ids on every machine."""
    payload = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(payload.encode("utf-8")).hexdigest()[:digits]


def query_id(query: str, image: str | None = None) -> str:
    """The id of a query, with the hash of its image where it has one."""
    return content_id("query", normalise(query), *([image] if image is not None else []))


def sft_id(query_id: str, prompt: str, conditions: str | None = None) -> str:
    """The id of an SFT row: a query with one of its prompts, under the conditions of its profile. Ids sort by
    query."""
    told = [conditions] if conditions else []
    return f"{query_id}-{content_id('sft', prompt, *told, digits=16)}"


def candidate_id(query_id: str, k: int, policy: str, sampling: dict[str, Any]) -> str:
    return content_id("candidate", query_id, k, policy, sampling)


def pair_id(kind: str, chosen_id: str, rejected_id: str, chosen: str, rejected: str) -> str:
    return content_id("pair", kind, chosen_id, rejected_id, chosen, rejected)


def group_id(candidate_ids: list[str], advantages: list[float]) -> str:
    return content_id("group", candidate_ids, [round(value, 9) for value in advantages])


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2**31) from content, so that order and worker count cannot change it."""
    return int(content_id("seed", *parts), 16) % 2**31


def share_of(*parts: Any) -> float:
    """A uniform number in [0, 1) from content, for splits and choices."""
    return int(content_id("share", *parts)[:13], 16) / 16**13


@dataclass(frozen=True)
class Shard:
    """The part of a run's queries that a driver of its own takes: one of `of` ranges of their ids.

    Ids are hashes, so the shards of a run are of about one size. Every query is in exactly one of them.

    Args:
        index: from 1 to `of`.

    Raises:
        ValueError: there is no such shard.
    """

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.of:
            raise ValueError(f"there is no shard {self}: the first of {self.of} is 1/{self.of}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From a text such as `3/8`. Raises ValueError."""
        index, _, of = text.partition("/")
        if not (index.isdecimal() and of.isdecimal()):
            raise ValueError(f"{text!r} is not a shard such as 3/8")
        return cls(int(index), int(of))

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    @property
    def rows(self) -> pc.Expression:
        """Selects the rows of the shard's queries, in any table with a `query_id`."""
        query = pc.field("query_id")
        above = pc.scalar(True) if self.index == 1 else query >= self._start(self.index)
        return above if self.index == self.of else above & (query < self._start(self.index + 1))

    def _start(self, index: int) -> str:
        """Where the ids of a shard begin."""
        return f"{(index - 1) * 16**16 // self.of:016x}"


def table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly this schema: absent keys are null, unknown keys refused.

    Raises:
        ValueError: an unknown key, a null where the schema allows none, or a value of a wrong type.
    """
    unknown = {key for row in rows for key in row} - set(schema.names)
    if unknown:
        raise ValueError(f"columns {sorted(unknown)} are not in the schema ({', '.join(schema.names)})")
    for field in schema:
        if not field.nullable and any(row.get(field.name) is None for row in rows):
            raise ValueError(f"column {field.name} is null in a row, the schema allows none")
        # Arrow would silently truncate it.
        if pa.types.is_integer(field.type) and any(isinstance(row.get(field.name), float) for row in rows):
            raise ValueError(f"a row does not fit the schema: {field.name} is no integer")
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"a row does not fit the schema: {error}") from error


def failed(row: Row, stage: str, reason: str) -> Row:
    """The row with the error that stopped it; later stages pass it on untouched."""
    text = reason[:2000].encode("utf-8", "replace").decode("utf-8")
    return {**row, "error": text, "error_stage": stage}
