"""AdaptiveRounds: the driver's side of rendering some of a query's candidates. Which of them is decided by
`stages/adaptive.py`, or by `stages/preview.py`.

A round is one pass of the stream's render and score stages over the candidates that are to be
rendered now. Between two rounds the tables say what comes next; candidates that turn out not to be
needed are stored as skipped, with the reason.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from vpo_ray.files.folder import chunks
from vpo_ray.recipe import Recipe
from vpo_ray.records import Row
from vpo_ray.stages.adaptive import decide
from vpo_ray.storage.id_sets import id_set, isin_sorted, union
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.tables import Table

logger = logging.getLogger(__name__)

# What rendering and scoring made of a candidate, as far as pairing looks at it.
_RESULTS = ["candidate_id", "query_id", "video_key", "answers", "dimensions", "score", "more_rewards",
            "skipped", "error", "error_stage"]  # fmt: skip
_ROWS_PER_PART = 1000
# What to do with the candidates of a query; see `adaptive.decide`.
Decide = Callable[[Sequence[Row]], dict[str, str | None]]


@dataclass
class _Round:
    """What a round finds: who is to be rendered, why others are not, and whether videos have no score."""

    render_ids: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    waits_for_scores: bool = False


class AdaptiveRounds:
    """The rounds of one call of the pipeline.

    Args:
        stages: `render`, and `score` where it belongs to the same pass.
        retry_errors: take candidates that failed in these stages once more, where they are needed.
        decide_query: which candidates of a query are rendered; `adaptive.decide` when unset.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        stages: Sequence[str],
        retry_errors: bool,
        decide_query: Decide | None = None,
    ) -> None:
        self._recipe, self._run, self._retry = recipe, run, retry_errors
        formula = recipe.formula and recipe.formula.at(run.round_number())
        self._decide = decide_query or partial(decide, settings=recipe.pair, formula=formula)
        self._scores = "score" in stages
        self._targets = [run.table("renders"), *([run.table("feedback")] if self._scores else [])]
        self._entered = id_set()

    def next(self) -> np.ndarray | None:
        """Store what is not needed; the ids that the render stage takes now.

        Returns:
            A sorted array of ids, which is empty where rows wait for the score stage only; None when
            there is nothing left that this call can do.

        Raises:
            StorageError: a table cannot be read or written.
        """
        found = _Round()
        for rows in chunks(self._not_needed(found), _ROWS_PER_PART):
            for target in self._targets:
                target.append(rows)
        for reason, count in found.skipped.items():
            logger.info("%d candidates are not rendered, %s", count, reason)
        if not found.render_ids and not (found.waits_for_scores and self._scores):
            return None
        logger.info("a round of %d candidates", len(found.render_ids))
        chosen = id_set(found.render_ids)
        self._entered = union(self._entered, chosen)
        return chosen

    def _not_needed(self, found: _Round) -> Iterator[Row]:
        """The rows to store as skipped, from a walk through all queries that fills `found`."""
        verdicts = QueryRows(self._run.table("verdicts"))
        renders = QueryRows(self._run.table("renders"), _RESULTS)
        feedback = QueryRows(self._run.table("feedback"), _RESULTS)
        for query in verdicts:
            rendered, finished = renders.rows(query), feedback.rows(query)
            found.waits_for_scores |= any(candidate not in finished for candidate in rendered)
            for row, reason in self._decided(verdicts.rows(query), rendered | finished):
                if reason is None:
                    found.render_ids.append(row["candidate_id"])
                else:
                    found.skipped[reason] += 1
                    yield {**row, "skipped": reason}

    def _decided(self, verdicts: dict[str, Row], results: dict[str, Row]) -> Iterator[tuple[Row, str | None]]:
        """The verdict rows of one query to render now (None) or to skip (why)."""
        if len(verdicts) < self._recipe.sample.k:
            return  # some are still to be judged, and any of them may decide
        known = []
        for candidate, row in verdicts.items():
            result = results.get(candidate)
            if result is not None and not self._is_again(candidate, row, result):
                row = {**row, **result}
            known.append(row)
        for candidate, reason in self._decide(known).items():
            stored = results.get(candidate)
            # What was skipped stays so, and what failed, while it is not needed.
            if stored is None or (reason is None and self._may_enter(candidate, verdicts, stored)):
                yield verdicts[candidate], reason

    def _is_again(self, candidate: str, verdict: Row, result: Row) -> bool:
        """Whether this call takes a candidate again that failed here, or in a text stage before."""
        failed = result["error"] is not None and verdict["error"] is None
        return self._retry and failed and not self._has_entered(candidate)

    def _may_enter(self, candidate: str, verdicts: dict[str, Row], stored: Row) -> bool:
        skipped = stored["skipped"] is not None and not self._has_entered(candidate)
        return skipped or self._is_again(candidate, verdicts[candidate], stored)

    def _has_entered(self, candidate: str) -> bool:
        return bool(isin_sorted(np.array([candidate], self._entered.dtype), self._entered)[0])


class QueryRows:
    """A table's rows by query, kept as Arrow until they are asked for.

    Args:
        columns: all when unset.
    """

    def __init__(self, table: Table, columns: list[str] | None = None) -> None:
        batches = list(table.batches(columns))
        schema = table.schema if columns is None else pa.schema([table.schema.field(n) for n in columns])
        self._rows = pa.Table.from_batches(batches, schema).sort_by("query_id")
        self._places: dict[str, tuple[int, int]] = {}
        start = 0
        for query, rows in itertools.groupby(self._rows["query_id"].to_pylist()):
            self._places[query] = (start, sum(1 for _ in rows))
            start += self._places[query][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def rows(self, query: str) -> dict[str, Row]:
        """The query's rows by candidate id: of one that is stored twice, the one with most in it."""
        if query not in self._places:
            return {}
        return best_rows(self._rows.slice(*self._places[query]).to_pylist())


def best_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by candidate id; a clean row goes before a skipped one, and that before a failed one."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row["error"] is not None, row.get("skipped") is not None)):
        best.setdefault(row["candidate_id"], row)
    return best
