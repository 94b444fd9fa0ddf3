"""The run directory: every table of a run, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from vpo_ray.files.folder import Folder
from vpo_ray.records import DRAFT, DROPPED, FEEDBACK, LABEL, PAIR, QUERY, SFT, Row, Shard
from vpo_ray.storage.tables import META, Table

# Tables of a run directory: schema and key. The four stage tables share one schema; a candidate's
# row moves from `candidates` to `feedback` and gains columns on the way.
TABLES: dict[str, tuple[pa.Schema, str]] = {
    "queries": (QUERY, "query_id"),
    "dropped": (DROPPED, "row_id"),
    "unlabelled": (QUERY, "query_id"),
    "labels": (LABEL, "query_id"),
    "drafts": (DRAFT, "draft_id"),
    "sft": (SFT, "query_id"),  # with the prompt: see ALSO
    "candidates": (FEEDBACK, "candidate_id"),
    "verdicts": (FEEDBACK, "candidate_id"),
    "renders": (FEEDBACK, "candidate_id"),
    "feedback": (FEEDBACK, "candidate_id"),
    "pairs": (PAIR, "pair_id"),
}
# The candidate stages in order, each with the table of the rows that left it. A streaming run may
# keep only the last: a row there carries all that the stages before it did.
CANDIDATE_TABLES = {"sample": "candidates", "judge": "verdicts", "render": "renders", "score": "feedback"}
# Columns that tell rows of one key apart: a query may be taught with several prompts.
ALSO: dict[str, tuple[str, ...]] = {"sft": ("prompt",)}

# What is known of a table beside its rows: how many raw queries became which, why queries have no pair,
# which SFT rows were left out.
CURATED, UNLABELLED, PAIRED, SFT_DROPPED = (
    f"{META}/{name}.json" for name in ("queries", "unlabelled", "pairs", "sft")
)
# Where earlier versions wrote it: in the table's folder.
_MOVED = {
    "queries/curated.json": (CURATED, None),
    "unlabelled/curated.json": (UNLABELLED, None),
    "sft/dropped.json": (SFT_DROPPED, None),
    "pairs/videos.json": (PAIRED, "videos"),
    "pairs/reasons.json": (PAIRED, "reasons"),
}

# In the run directory of a round or an evaluation: which policy it samples.
ROUND = "round.json"


class RunDir(Folder):
    """One run: `recipe.yaml`, `versions.json`, the tables (folders of Parquet parts), `meta/`, `videos/`,
    `checkpoints/`, `metrics/`, `report/` and `ledger.json`.

    Args:
        shard: its tables show the queries and candidates of this shard only.
    """

    def __init__(self, uri: str | Path, shard: Shard | None = None) -> None:
        super().__init__(uri)
        self.shard = shard

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.uri, self.shard))

    def root(self) -> tuple[RunDir, str]:
        """The run directory that this one is a round or an evaluation of, directly or not, and its place
        in there; itself and "" where it is none."""
        run, place = RunDir(self.uri), ""
        while run.exists(ROUND):
            path, sign, options = run.uri.partition("?") if "://" in run.uri else (run.uri, "", "")
            *above, kind, name = path.split("/")
            if kind not in ("rounds", "evaluation"):
                break
            run = RunDir(f"{'/'.join(above)}{sign}{options}")
            place = f"{kind}/{name}/{place}".rstrip("/")
        return run, place

    def move_meta(self) -> None:
        """Bring what an earlier version wrote into the tables' folders to META."""
        for old, (new, part) in _MOVED.items():
            if not self.exists(old):
                continue
            with suppress(FileNotFoundError):  # another shard's driver moves it too
                value = self.read_json(old)
                if part is not None:
                    value = {**(self.read_json(new) if self.exists(new) else {}), part: value}
                self.write_json(new, value)
                self.delete(old)

    def table(self, name: str) -> Table:
        schema, key = TABLES[name]
        return Table(self.at(name), schema, key, ALSO.get(name, ()), self.shard)

    def rows_of_stage(self, stage: str, columns: Sequence[str]) -> Iterator[Row]:
        """Rows that left a candidate stage, from its own table or the nearest later one that holds any."""
        order = list(CANDIDATE_TABLES)
        for later in order[order.index(stage) :]:
            table = self.table(CANDIDATE_TABLES[later])
            if table.parts():
                yield from table.rows(columns)
                return

    def write_metrics(self, phase: str, lines: Sequence[Row]) -> None:
        """Store a training curve: `metrics/<phase>.jsonl`, one JSON object a step."""
        self.write(f"metrics/{phase}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    def metrics(self, phase: str) -> list[Row]:
        if not self.exists(f"metrics/{phase}.jsonl"):
            return []
        return [json.loads(line) for line in self.read(f"metrics/{phase}.jsonl").splitlines()]
