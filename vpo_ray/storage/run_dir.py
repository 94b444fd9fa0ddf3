"""The run directory: all tables and files of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from vpo_ray.files.folder import Folder
from vpo_ray.records import (
    DRAFT,
    DROPPED,
    EVOLUTION,
    FEEDBACK,
    GROUP,
    LABEL,
    OFFSPRING,
    PAIR,
    PREFERENCE,
    QUERY,
    SFT,
    TOKENS,
    Row,
    Shard,
)
from vpo_ray.storage.tables import META, Table

# Tables of a run directory: schema and key. Tables of one chain of stages share a schema; a candidate's
# row moves from `candidates` to `feedback` and gains columns on the way. A streaming run may keep only the
# last. `stages.spec.register` adds those of further stages.
TABLES: dict[str, tuple[pa.Schema, str]] = {
    "queries": (QUERY, "query_id"),
    "dropped": (DROPPED, "row_id"),
    "unlabelled": (QUERY, "query_id"),
    "labels": (LABEL, "query_id"),
    "drafts": (DRAFT, "draft_id"),
    "evolutions": (EVOLUTION, "prompt_id"),
    "sft": (SFT, "query_id"),  # with more: see ALSO
    "candidates": (FEEDBACK, "candidate_id"),
    "verdicts": (FEEDBACK, "candidate_id"),
    "renders": (FEEDBACK, "candidate_id"),
    "feedback": (FEEDBACK, "candidate_id"),
    "pairs": (PAIR, "pair_id"),
    "groups": (GROUP, "group_id"),
    # Of an evolution, in EVOLUTION_ASKED: see `stages.evolve`.
    "histories": (OFFSPRING, "ask_id"),
    "offspring": (OFFSPRING, "ask_id"),
    # Of an evaluation: see `stages.rewrite` and `stages.prefer`.
    "unwritten": (QUERY, "query_id"),
    "rewrites": (FEEDBACK, "candidate_id"),
    "matches": (PREFERENCE, "preference_id"),
    "preferences": (PREFERENCE, "preference_id"),
}
# Columns that identify a row together with its key: SFT may teach several prompts of one query, each under
# several profiles.
ALSO: dict[str, tuple[str, ...]] = {"sft": ("prompt", "conditions")}

# Facts about a table: counts of raw queries by outcome, why queries have no pair, which SFT rows were left
# out.
CURATED, UNLABELLED, PAIRED, GROUPED, SFT_DROPPED = (
    f"{META}/{name}.json" for name in ("queries", "unlabelled", "pairs", "groups", "sft")
)
# Where earlier versions wrote them: in the table's folder.
_MOVED = {
    "queries/curated.json": (CURATED, None),
    "unlabelled/curated.json": (UNLABELLED, None),
    "sft/dropped.json": (SFT_DROPPED, None),
    "pairs/videos.json": (PAIRED, "videos"),
    "pairs/reasons.json": (PAIRED, "reasons"),
}


def widen(tables: Sequence[str], stage: str, columns: Sequence[pa.Field]) -> None:
    """Give the rows of these tables more columns, and a place for the seconds and tokens of one more
    stage. What was stored before has nulls there."""
    for name in tables:
        schema, key = TABLES[name]
        for column, of_stage in (("seconds", pa.float64()), ("usage", TOKENS)):
            at = schema.get_field_index(column)
            inner = [*schema.field(at).type, pa.field(stage, of_stage)]
            schema = schema.set(at, pa.field(column, pa.struct(inner)))
        for column in columns:
            schema = schema.insert(schema.get_field_index("seconds"), column)
        TABLES[name] = schema, key


widen(["rewrites"], "rewrite", ())

# The run directories of an evolution: what LLMs are shown and write, and what becomes of the prompts.
EVOLUTION_ASKED, EVOLUTION_SCORED = "evolution/asked", "evolution/scored"
# In the run directory of a round, an evolution or an evaluation: what it is, and the policy that it samples.
ROUND = "round.json"
_INNER = ("rounds", "evolution", "evaluation", "preview")  # folders with such run directories
LATEST = "evaluation.json"  # which evaluation is the newest
# In one of an evolution or evaluation: its stages, and how many rows that others made enter the first.
GIVEN = f"{META}/given.json"


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
        """The outermost run directory that this one is a round, an evolution, an evaluation or the previews
        of, and its path in it; itself and "" for a run of its own."""
        run, place = RunDir(self.uri), ""
        while run.exists(ROUND):
            path, sign, options = run.uri.partition("?") if "://" in run.uri else (run.uri, "", "")
            *above, kind, name = path.split("/")
            if kind not in _INNER:
                break
            run = RunDir(f"{'/'.join(above)}{sign}{options}")
            place = f"{kind}/{name}/{place}".rstrip("/")
        return run, place

    def with_inner(self, place: str = "") -> Iterator[tuple[str, RunDir]]:
        """This run directory and all that are in it, whose videos are in the same store, each with its path
        in it (behind `place`)."""
        yield place, self
        for kind in (*_INNER, "refined"):
            for name in (self / kind).folders():
                inner = RunDir(self.at(f"{kind}/{name}"))
                yield from inner.with_inner(f"{place}/{kind}/{name}".lstrip("/"))

    def round_number(self) -> int:
        """Which round of its run this is, from 1."""
        found: int = self.read_json(ROUND).get("round", 1) if self.exists(ROUND) else 1
        return found

    def last_round(self, phase: str) -> int:
        """The last round whose phase has trained a policy; 1 where none has."""
        number, found = 2, 1
        while self.exists(f"rounds/{number}/{ROUND}"):
            if self.exists(f"rounds/{number}/checkpoints/{phase}/vpo.json"):
                found = number
            number += 1
        return found

    def last_policy(self, phase: str) -> str:
        """The folder of what a phase trained in the last round that has it; of the first where none does."""
        number = self.last_round(phase)
        return self.at(f"rounds/{number}/checkpoints/{phase}" if number > 1 else f"checkpoints/{phase}")

    def newest_evaluation(self) -> Row | None:
        """The results of the run's newest evaluation, in `evaluation/<id>`."""
        if not self.exists(LATEST):
            return None
        found: Row = self.read_json(self.read_json(LATEST)["results"])
        return found

    def move_meta(self) -> None:
        """Move files that an earlier version wrote into the tables' folders to META."""
        for old, (new, part) in _MOVED.items():
            if not self.exists(old):
                continue
            with suppress(FileNotFoundError):  # another shard's driver may move it too
                value = self.read_json(old)
                if part is not None:
                    value = {**(self.read_json(new) if self.exists(new) else {}), part: value}
                self.write_json(new, value)
                self.delete(old)

    def table(self, name: str) -> Table:
        schema, key = TABLES[name]
        return Table(self.at(name), schema, key, ALSO.get(name, ()), self.shard)

    def write_metrics(self, phase: str, lines: Sequence[Row]) -> None:
        """Store a training curve: `metrics/<phase>.jsonl`, one JSON object a step."""
        self.write(f"metrics/{phase}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    def metrics(self, phase: str) -> list[Row]:
        if not self.exists(f"metrics/{phase}.jsonl"):
            return []
        return [json.loads(line) for line in self.read(f"metrics/{phase}.jsonl").splitlines()]
