"""The rows that an evaluation is computed from; every figure of a results file follows from them."""

from __future__ import annotations

import pyarrow as pa

# One row a set, policy, video model, query and seed.
SAMPLE = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("set", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("policy", pa.string(), nullable=False),  # its name in evaluate.policies
        pa.field("video_model", pa.string(), nullable=False),  # "render", or a name of evaluate.transfer
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("unsafe", pa.bool_()),
        pa.field("seed", pa.int32(), nullable=False),  # 0, 1, … of evaluate.seeds
        pa.field("prompt", pa.string()),
        pa.field("verdict", pa.string()),  # aligned | unsafe | imprecise | refusal; null: none was given
        pa.field("critique", pa.string()),
        pa.field("video_key", pa.string()),
        pa.field("video_uri", pa.string()),
        # Why there is no video although one was wanted, such as `unsafe: not rendered`.
        pa.field("skipped", pa.string()),
        pa.field("error", pa.string()),
        pa.field("error_stage", pa.string()),  # sample | judge | render | score | …
        # By names such as `reward` (its score), `reward.alignment` (a dimension), `prompt.words`.
        pa.field("measures", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
    ]
)

# What an LLM or a person prefers of what two policies made of one query; one row an order (an LLM), or a
# vote (a person). `a` is shown first.
COMPARISON = pa.schema(
    [
        pa.field("comparison_id", pa.string(), nullable=False),
        pa.field("set", pa.string(), nullable=False),
        pa.field("what", pa.string(), nullable=False),  # prompt | video
        pa.field("by", pa.string(), nullable=False),  # model, or a rater's name
        pa.field("video_model", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("a", pa.string(), nullable=False),  # policy
        pa.field("b", pa.string(), nullable=False),  # policy
        pa.field("answer", pa.string()),  # a | b | tie; null: none, see error
        pa.field("raw", pa.string()),
        pa.field("error", pa.string()),
    ]
)
