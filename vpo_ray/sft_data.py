"""SFT data: read from the file that a recipe names, or taken from the run's own drafts.

Either way the policy learns rows of `query` and `prompt`. Drafts are also written as chat-format
Parquet, `sft_data.parquet` of the run directory, which another recipe's `sft.data` may name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpo_ray.records import Row, normalise, query_id, table
from vpo_ray.stages.curate import InputError
from vpo_ray.storage import RunDir

CHAT_FILE = "sft_data.parquet"
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
CHAT = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("messages", pa.list_(_MESSAGE), nullable=False),
    ]
)


def sft_rows(path: str, key: str = "sft.data") -> Iterator[Row]:
    """Examples of a JSONL or Parquet file with `query` and `prompt`.

    Args:
        key: the recipe's key that names the file, for messages.

    Raises:
        InputError: no such file, another kind, or a row without both texts (named by its number).
    """
    try:
        records: list[Any]
        if path.endswith(".parquet"):
            records = pq.read_table(path, columns=["query", "prompt"]).to_pylist()
        else:
            records = [
                json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line.strip()
            ]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{key} {path}: cannot read it as JSONL or Parquet with query and prompt: {error}"
        ) from error
    for number, record in enumerate(records, start=1):
        query, prompt = (
            record.get(name) if isinstance(record, dict) else None for name in ("query", "prompt")
        )
        if not (isinstance(query, str) and isinstance(prompt, str) and query.strip() and prompt.strip()):
            raise InputError(f"{key} {path}: row {number} needs a text `query` and a text `prompt`")
        yield {"query_id": query_id(query), "query": normalise(query), "prompt": normalise(prompt)}


def distinct(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """The rows in their order, each query with each of its prompts once, and how many came again."""
    every = list(rows)
    once = list({(row["query_id"], row["prompt"]): row for row in every}.values())
    return once, len(every) - len(once)


def draft_rows(run: RunDir) -> Iterator[Row]:
    """The run's drafts that have a target, as SFT rows in the order of their ids."""
    columns = ["draft_id", "query_id", "query", "target", "error"]
    rows = sorted(run.table("drafts").rows(columns), key=lambda row: row["query_id"])
    for row in rows:
        if row["target"] is not None and row["error"] is None:
            yield {"query_id": row["query_id"], "query": row["query"], "prompt": normalise(row["target"])}


def write_chat(run: RunDir) -> int:
    """Write CHAT_FILE from the drafts; returns how many rows it has."""
    rows = [
        {
            **row,
            "messages": [
                {"role": "user", "content": row["query"]},
                {"role": "assistant", "content": row["prompt"]},
            ],
        }
        for row in draft_rows(run)
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(table(rows, CHAT), sink, compression="zstd")
    run.write(CHAT_FILE, sink.getvalue().to_pybytes())
    return len(rows)
