"""SFT data: rows of `query` and `prompt`, from a file that the recipe names or from the run's own drafts or
evolved prompts.

Those are also written as chat-format Parquet, `sft_data.parquet` in the run directory, which another
recipe's `sft.data` may name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vpo_ray.files.input_files import InputError, InputFile, find_files
from vpo_ray.files.record_files import READERS, Unreadable, records
from vpo_ray.prompts.conditions import asked_of
from vpo_ray.records import Row, normalise, query_id, table
from vpo_ray.storage.run_dir import RunDir

CHAT_FILE = "sft_data.parquet"
COLUMNAR = {kind for kind in READERS if kind != ".txt"}  # kinds of files whose rows have columns
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
CHAT = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("messages", pa.list_(_MESSAGE), nullable=False),
    ]
)


# Of the same file where a row has an image, and where one was drafted under a profile.
_ASKED = ("profile", "conditions")


def sft_files(path: str, key: str = "sft.data") -> list[InputFile]:
    """The files of a path, see `sft_rows`."""
    return find_files(path, key, COLUMNAR, any_kind=True)


def sft_rows(
    path: str, key: str = "sft.data", profile: str | None = None, image: str | None = None
) -> Iterator[Row]:
    """Examples with `query` and `prompt` from a file or folder, in any format that queries may have.

    Args:
        path: see `input_files`; a file of unknown kind is read as JSONL.
        key: the recipe's key that names the file, for messages.
        profile: the column with the name of a row's profile, which becomes its `profile`.
        image: the column with the path of a row's image, which becomes its `image`, with the number of the
            file among `sft_files` as its `file`.

    Raises:
        InputError: no such file, another kind, or a row without both texts (named by its number).
    """
    more = {name: column for name, column in (("profile", profile), ("image", image)) if column is not None}
    for position, file in enumerate(sft_files(path, key)):
        kind = file.kind if file.kind in COLUMNAR else ".jsonl"
        wanted = ["query", "prompt", *more.values()]
        for number, values in enumerate(records(file, wanted, key, kind), start=1):
            where = f"{key} {file}: row {number}"
            if isinstance(values, Unreadable) and values.reason != "no such column":
                raise InputError(f"{where} cannot be read: {values.reason}")
            texts = values[:2] if isinstance(values, tuple) else ()
            if len(texts) != 2 or not all(map(_is_text, texts)):
                raise InputError(f"{where} needs a text `query` and a text `prompt`")
            query, prompt = map(normalise, texts)
            named = {name: value or None for name, value in zip(more, values[2:], strict=True)}
            where_from = {} if image is None else {"file": position}
            yield {"query_id": query_id(query), "query": query, "prompt": prompt, **named, **where_from}


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(normalise(value).strip())
    except UnicodeEncodeError:
        return False


def distinct(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """The rows in order without those of the same query, prompt and conditions as another, and the number of
    these."""
    every = list(rows)
    once = list({(row["query_id"], row["prompt"], row.get("conditions")): row for row in every}.values())
    return once, len(every) - len(once)


def draft_rows(run: RunDir) -> Iterator[Row]:
    """The run's drafts that have a target, as SFT rows in the order of their ids."""
    columns = ["draft_id", "query_id", "query", "image", "profile", "conditions", "target", "error"]
    rows = sorted(run.table("drafts").rows(columns), key=lambda row: row["query_id"])
    for row in rows:
        if row["target"] is not None and row["error"] is None:
            asked = {name: row[name] for name in ("image", *_ASKED) if row[name] is not None}
            texts = {"query": row["query"], "prompt": normalise(row["target"])}
            yield {"query_id": row["query_id"], **texts, **asked}


def evolved_rows(run: RunDir) -> Iterator[Row]:
    """The targets of the run's evolved prompts, as SFT rows in the order of their ids."""
    columns = ["prompt_id", "query_id", "query", "image", "prompt", "target"]
    targets = run.table("evolutions").rows(columns, pc.field("target"))
    for row in sorted(targets, key=lambda row: str(row["query_id"])):
        image = {} if row["image"] is None else {"image": row["image"]}
        texts = {"query": row["query"], "prompt": normalise(row["prompt"])}
        yield {"query_id": row["query_id"], **texts, **image}


def write_chat(run: RunDir, examples: Iterable[Row]) -> int:
    """Write CHAT_FILE from SFT rows; returns how many it has. The path of an image is from its folder."""
    rows = [
        {
            **row,
            **({"image": f"images/{row['image']}"} if row.get("image") else {}),
            "messages": [
                {"role": "user", "content": asked_of(row)},
                {"role": "assistant", "content": row["prompt"]},
            ],
        }
        for row in examples
    ]
    more = ["image"] if any(row.get("image") for row in rows) else []
    more += _ASKED if any(row.get("profile") for row in rows) else []
    schema = pa.schema([*CHAT, *(pa.field(name, pa.string()) for name in more)])
    sink = pa.BufferOutputStream()
    pq.write_table(table(rows, schema), sink, compression="zstd")
    run.write(CHAT_FILE, sink.getvalue().to_pybytes())
    return len(rows)
