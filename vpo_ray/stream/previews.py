"""Previews as passes of the stream: the driver's side of `render.preview` (`stages/preview.py` decides).

    previews of the probe ─► full renders of it ─► do they agree? ─► previews of the rest ─► the full renders

Previews go through the render and score stages in a run directory of their own, `<run>/preview/<id>`, as rows
of any run do: what is there is not made again. Which candidates come next follows from the tables, so that
neither a kill nor the number of replicas changes what is rendered.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from vpo_ray.files.folder import chunks
from vpo_ray.records import Row
from vpo_ray.stages.preview import (
    MEASURED,
    decide_by_previews,
    preview_recipe,
    preview_row,
    probe_figures,
    prompts_to_preview,
    told,
)
from vpo_ray.storage.run_dir import ROUND, RunDir
from vpo_ray.stream.adaptive_rounds import AdaptiveRounds, QueryRows
from vpo_ray.stream.passes import Pass

logger = logging.getLogger(__name__)

_ROWS_PER_PART = 10_000
_ELSEWHERE = (
    "render.preview is not measured yet: the first shard renders the probe. Run this shard again when "
    "that has, or the command without --shard"
)


class PreviewError(RuntimeError):
    """Previews that must not decide; the message says why and what to change."""


class Previews:
    """The previews of one call of the pipeline.

    Args:
        videos: the pass that renders and scores in full.
    """

    def __init__(self, videos: Pass) -> None:
        recipe, run = videos.recipe, videos.run
        assert recipe.render.preview is not None
        self._videos, self._settings = videos, recipe.render.preview
        self._pair = recipe.pair
        self._formula = recipe.formula and recipe.formula.at(run.round_number())
        self._own = preview_recipe(recipe, run)
        self._run = RunDir(self._own.out, run.shard)
        self._rounds = AdaptiveRounds(recipe, run, videos.stages, videos.retry_errors, self._decide)
        self._seen = QueryRows(self._run.table("feedback"))
        self._probe: frozenset[str] = frozenset()
        self._measured = False

    def passes(self) -> Iterator[Pass]:
        """What the stream is to go through, one after the other; each is made when the one before has ended.

        Raises:
            PreviewError: previews do not order candidates as full renders do, or nobody knows yet.
            StorageError: a table cannot be read or written.
        """
        wanted = self._wanted()
        found = self._known()
        self._probe = frozenset(found["probe"] if found else sorted(wanted)[: self._settings.probe])
        if wanted:
            self._run.write_json(ROUND, {"of": self._videos.run.uri})
            fresh = found is None or not self._agrees(found)
            if fresh and self._is_elsewhere:
                yield self._previews(wanted, wanted, retry=True)
                if (found := self._known()) is None:
                    raise PreviewError(_ELSEWHERE)
                self._probe = frozenset(found["probe"])
            elif fresh:
                self._probe = frozenset(sorted(wanted)[: self._settings.probe])
                yield self._previews(wanted, self._probe, retry=True)
                yield from self._full()
                found = self._measure()
            if wanted.keys() - self._probe and found is not None:
                self._refuse(found)
                self._videos.run.write_json(MEASURED, found | {"chosen": True})
            yield self._previews(wanted, wanted, retry=not fresh)
        self._measured = True
        yield from self._full()

    @property
    def _is_elsewhere(self) -> bool:
        """Whether another driver renders the probe: the first shard's, as it has the first queries."""
        shard = self._videos.run.shard
        return shard is not None and shard.index > 1

    def _wanted(self) -> dict[str, list[Row]]:
        """By query, the prompts to preview, of all queries whose texts are finished."""
        found = {}
        verdicts = QueryRows(self._videos.chain.table_before(self._videos.run, "render"))
        for query in verdicts:
            rows = list(verdicts.rows(query).values())
            if len(rows) < self._videos.recipe.sample.k:
                continue
            if prompts := prompts_to_preview(rows, self._pair, self._formula):
                found[query] = [preview_row(row) for row in prompts]
        return found

    def _previews(self, wanted: Mapping[str, Sequence[Row]], queries: Iterable[str], retry: bool) -> Pass:
        """The pass of the previews of these queries, whose rows are entered."""
        source = self._videos.chain.table_before(self._run, "render")
        known = source.keys()
        new = (row for q in sorted(queries) for row in wanted[q] if row["candidate_id"] not in known)
        for part in chunks(new, _ROWS_PER_PART):
            source.append(part)
        retry = retry and self._videos.retry_errors
        return replace(self._videos, recipe=self._own, run=self._run, retry_errors=retry)

    def _full(self) -> Iterator[Pass]:
        """Passes of the full renders that are due now."""
        self._seen = QueryRows(self._run.table("feedback"))
        while (ids := self._rounds.next()) is not None:
            yield replace(self._videos, retry_errors=False, render_ids=ids)

    def _decide(self, candidates: Sequence[Row]) -> dict[str, str | None]:
        query = candidates[0]["query_id"]
        if query not in self._probe and not self._measured:
            return {}
        previews = None if query in self._probe else self._seen.rows(query)
        return decide_by_previews(candidates, previews, self._settings, self._pair, self._formula)

    def _measure(self) -> Row:
        """What the probe says of previews, which is written into the run directory and told. Once they choose
        candidates, `chosen` is there, too."""
        run = self._videos.run
        full = QueryRows(run.table("feedback"))
        queries = ((self._seen.rows(q), list(full.rows(q).values())) for q in sorted(self._probe))
        figures = probe_figures(queries, self._settings, self._pair, self._formula)
        facts = {"previews": self._name, "probe": sorted(self._probe), "asked": self._settings.probe}
        facts |= figures
        run.write_json(MEASURED, facts)
        logger.info("render.preview: %s", told(facts))
        return facts

    def _known(self) -> Row | None:
        """What an earlier call, or another shard, measured of these previews."""
        run = self._videos.run
        found: Row = run.read_json(MEASURED) if run.exists(MEASURED) else {}
        same = found.get("previews") == self._name and found.get("asked") == self._settings.probe
        return found if same else None

    @property
    def _name(self) -> str:
        return self._own.out.partition("?")[0].rpartition("/")[2]

    def _agrees(self, found: Row) -> bool:
        return found["agreement"] is not None and found["agreement"] >= self._settings.agreement

    def _refuse(self, found: Row) -> None:
        if found["agreement"] is None:
            raise PreviewError(
                f"render.preview: {told(found)}: no two candidates of a query have previews, and other "
                "scores in full. Enlarge render.preview.probe, leave previews out, or look at the errors"
                f" in {self._run.at('feedback')} and {self._videos.run.at('feedback')}"
            )
        if not self._agrees(found):
            raise PreviewError(
                f"render.preview: {told(found)}. That is below render.preview.agreement "
                f"{self._settings.agreement:g}, and previews would choose wrong candidates. Give them more "
                "steps, more frames or a larger size, lower the bound, or leave render.preview out; the same "
                "run goes on with what is made"
            )
