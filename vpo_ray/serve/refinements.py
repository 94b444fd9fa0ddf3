"""`/v1/optimize` with effort `videos`: the prompts of one query, evolved as `vpo refine` does, as a job.

One replica of `RefinementJobs` owns all jobs. It asks the LLMs over HTTP, and has videos rendered and scored
by the replicas that `/v1/videos` has. What comes next follows from what is stored of the job (see
`stages.evolution`), so a restarted replica goes on; answers and videos that are paid for are found again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from fastapi.responses import Response
from ray.serve.handle import DeploymentHandle

from vpo_ray.engines.chat import Chat, ChatError, Metered
from vpo_ray.engines.chat.images import ShownImages
from vpo_ray.engines.chat.openai_chat import Answers, OpenAIChat
from vpo_ray.engines.endpoint.account import Account
from vpo_ray.engines.endpoint.client import EndpointClient, EndpointError
from vpo_ray.files.folder import join
from vpo_ray.lifetime import bind_worker
from vpo_ray.prompts.answers import AnswerError
from vpo_ray.recipe import ChatModel, Evolve, Serve
from vpo_ray.records import FEEDBACK, OFFSPRING, Row, failed, query_id
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.images import GivenImage, digest_of, film_images, keep_image, stored_image
from vpo_ray.serve.job_files import JobRunner, tried
from vpo_ray.serve.keys import Key
from vpo_ray.serve.limits import Take
from vpo_ray.serve.optimiser import Checked, build_optimiser, refusal
from vpo_ray.serve.optimize_schema import Asked, GeneratorFlag
from vpo_ray.serve.policy import overloaded
from vpo_ray.serve.refine_schema import Refinement, Refinements, StoredRefinement, refinement_files, traced
from vpo_ray.stages.evolution import (
    NONE_BETTER,
    FitnessError,
    candidate_row,
    entries_of,
    finished,
    next_ask,
    videos_of,
    waits,
    why_ended,
)
from vpo_ray.stages.evolve import Evolver
from vpo_ray.stages.judge import Judging

logger = logging.getLogger("ray.serve")

# What is kept of a prompt's row.
_KEPT = (
    "verdict", "critique", "video_key", "video_uri", "video_seed", "dimensions", "score", "more_rewards",
    "skipped", "error", "error_stage",
)  # fmt: skip
SEED = 0  # of all jobs, as equal queries are one
SETTINGS_CHANGED = "the endpoint's models or settings changed meanwhile; ask again"


class RefinementJobs(JobRunner[StoredRefinement]):
    """Owns the jobs; one replica.

    Args:
        main, canary, settings, control: see `build_optimiser`, whose safety gate looks at query and prompts.
        renderer, scorer: handles of `VideoRenderer` and `VideoScorer`.
    """

    def __init__(
        self,
        main: DeploymentHandle,
        canary: DeploymentHandle | None,
        renderer: DeploymentHandle,
        scorer: DeploymentHandle,
        settings: Serve,
        control: tuple[str, ...],
    ) -> None:
        bind_worker()
        assert settings.videos is not None
        refine = settings.videos.refine
        assert refine is not None
        assert refine.judge is not None
        store = settings.videos.store
        self.optimiser = build_optimiser(main, canary, settings, control)
        self.settings, self.renderer, self.scorer = settings, renderer, scorer
        self.names, self.jobs = Refinements(settings), refinement_files(store)
        self.evolve = refine.evolve or Evolve.model_validate({})
        judge = refine.judge.model_copy(update={"refine": False})
        self.judging, self.evolver = Judging(judge), Evolver(self.evolve, judge)
        self.judge = _chat(judge, "judge", store)
        self.writer = self.judge if self.evolve.llm is None else _chat(self.evolve.llm, "evolve.llm", store)
        self.writer_model = (self.evolve.llm or judge).model
        self.video_price = settings.videos.render.endpoint.cost if settings.videos.render else 0.0
        self.images = ShownImages(film_images(settings).folder.uri)
        self.max_waiting = refine.max_waiting
        self.tasks = set()
        self.live: dict[str, StoredRefinement] = {}
        self.entering = asyncio.Lock()
        self._go_on()

    async def submit(
        self,
        query: str,
        flags: list[dict[str, str]],
        budget: int,
        owner: str,
        image: str | None = None,
    ) -> str | None:
        """Take a query, and return its job as JSON: that of an earlier caller, or a new one; None when too
        many are waiting. One that failed is tried again, and what was made of it stays.

        Args:
            image: the name of the query's image in `images.film_images`.
        """
        found = [GeneratorFlag(**flag) for flag in flags]
        name = self.names.name(query, found, budget, image)
        async with self.entering:
            job = self.live.get(name) or await asyncio.to_thread(self.jobs.read, name)
            if job is None or (job.status == "failed" and name not in self.live):
                if len(self.tasks) >= self.max_waiting:
                    return None
                if job is not None:
                    job = _anew(job)
                else:
                    job = StoredRefinement(
                        id=name,
                        model=self.settings.model_name,
                        query=query,
                        image=image,
                        flags=found,
                        budget=budget,
                        created_at=int(time.time()),
                    )
                job.owners = list(dict.fromkeys([*job.owners, owner]))
                stored = asyncio.get_running_loop().create_future()
                self._start(job, stored)
                await asyncio.shield(stored)
            elif owner not in job.owners:
                job.owners.append(owner)
                await asyncio.to_thread(self.jobs.write, job)
        return job.shown().model_dump_json()

    def _start(self, job: StoredRefinement, stored: asyncio.Future[None] | None = None) -> None:
        self.live[job.id] = job
        super()._start(job, stored)

    async def _run(self, job: StoredRefinement, stored: asyncio.Future[None] | None = None) -> None:
        try:
            await super()._run(job, stored)
        finally:
            self.live.pop(job.id, None)

    async def _make(self, job: StoredRefinement) -> None:
        try:
            await self._search(job)
        except EndpointError as error:
            logger.error("job %s: an LLM cannot be used (status %s)", job.id, error.status)
            message = "an LLM that writes or judges prompts cannot be used"
            raise ApiError(503, message, code="llm_failed") from error

    async def _search(self, job: StoredRefinement) -> None:
        if job.id != self.names.name(job.query, job.flags, job.budget, job.image):
            raise ApiError(409, SETTINGS_CHANGED, code="settings_changed")
        image = await stored_image(self.settings, job.image)
        checked = await self.optimiser.check_query(job.query, job.flags, image)
        job.safety = checked.safety
        if checked.refused:
            raise refusal(job.safety, None)
        job.status = "in_progress"
        settings = self.evolve.model_copy(update={"budget": job.budget})
        # As `/v1/videos` has it, which finds the videos again by query, prompt and seed 0.
        query: Row = {
            "query_id": f"{query_id(job.query, digest_of(image))}-0",
            "query": job.query,
            "image": job.image,
            "unsafe": checked.verdict.flagged or None,
        }
        while True:
            try:
                entries = entries_of(query, job.asks, job.results, settings)
            except FitnessError as error:
                raise ApiError(500, f"evolve.fitness, evolve.thresholds: {error}") from None
            rows = finished(entries, settings)
            job.videos, job.trace = videos_of(entries), [traced(row) for row in rows]
            await asyncio.to_thread(self.jobs.write, job)
            if waiting := [entry for entry in entries if waits(entry)]:
                results = await asyncio.gather(*(self._result(job, entry, image) for entry in waiting))
                job.results |= {entry["prompt_id"]: r for entry, r in zip(waiting, results, strict=True)}
            elif why_ended(entries, settings) is None:
                ask = next_ask(entries, settings, self.writer_model, SEED)
                job.asks.append(await self._written(job, ask))
            else:
                await self._conclude(job, checked, rows)
                return

    async def _written(self, job: StoredRefinement, ask: Row) -> Row:
        """What the LLM writes of one round."""
        row = {**dict.fromkeys(OFFSPRING.names), **ask}
        chat = Metered(self.writer)
        model = self.evolve.llm or self.judging.settings
        try:
            return await self.evolver(row, await self._shown(chat, model, job))
        except (ChatError, AnswerError) as error:
            return failed(row, "evolve", f"{type(error).__name__}: {error}")
        finally:
            job.cost += chat.usage.cost

    async def _shown(self, chat: Chat, model: ChatModel, job: StoredRefinement) -> Chat:
        """A chat about the job's query, with its image where the model is shown any."""
        if job.image is None or model.images == "ignore":
            return chat
        return await asyncio.to_thread(self.images.beside, chat, job.image)

    async def _result(self, job: StoredRefinement, entry: Row, image: GivenImage | None) -> Row:
        """What becomes of one prompt: judged, checked by the gate, rendered and scored."""
        row: Row = {**dict.fromkeys(FEEDBACK.names), **candidate_row(entry)}
        if row["verdict"] is None:
            row = await self._judged(job, row, image)
        if row["verdict"] == "aligned" and row["error"] is None:
            row = await self._scored(job, row)
        return {name: row[name] for name in _KEPT}

    async def _judged(self, job: StoredRefinement, row: Row, image: GivenImage | None) -> Row:
        chat = Metered(self.judge)
        try:
            row = await self.judging(row, await self._shown(chat, self.judging.settings, job))
        except (ChatError, AnswerError) as error:
            return failed(row, "judge", f"{type(error).__name__}: {error}")
        finally:
            job.cost += chat.usage.cost
        gate = self.optimiser.gate
        if gate.settings.prompt and row["verdict"] == "aligned":
            [verdict] = await gate.check_all([row["prompt"]], image)
            if verdict.flagged:
                return {**row, "verdict": "unsafe", "critique": f"safety gate: {verdict.reason}"}
        return row

    async def _scored(self, job: StoredRefinement, row: Row) -> Row:
        rendered = await tried(lambda: self.renderer.remote(row))
        job.cost += self.video_price
        if rendered["error"] is not None:
            return dict(rendered)
        scored = await tried(lambda: self.scorer.remote(rendered))
        if scored["error"] is None and scored["score"] is None:
            return failed(scored, "score", "the reward gave no score")
        return dict(scored)

    async def _conclude(self, job: StoredRefinement, checked: Checked, rows: list[Row]) -> None:
        """The best prompt; the query, where no prompt is better, or where none passes and the endpoint falls
        back. Raises ApiError where there is neither."""
        job.fault, job.ended = rows[0]["fault"], rows[0]["ended"]
        job.prompt = next((row["prompt"] for row in rows if row["target"]), None)
        if job.prompt is None and (job.fault == NONE_BETTER or self.settings.fallback):
            own = await self.optimiser.fall_back(checked)
            job.prompt, job.safety = own.prompt, own.safety
            if own.prompt is None:
                raise refusal(job.safety, None)
        if job.prompt is None:
            raise ApiError(500, f"no prompt was found: {job.fault}; see the trace", code="no_prompt")
        job.changed = job.prompt != job.query


def _anew(job: StoredRefinement) -> StoredRefinement:
    """A job that failed, to be tried again: without what went wrong."""
    results = {name: row for name, row in job.results.items() if row["error"] is None}
    asks = [ask for ask in job.asks if ask["error"] is None]
    # Of a round that is asked for again, the later ones are not known.
    kept = [ask for number, ask in enumerate(asks, 1) if ask["round"] == number]
    fresh = {"status": "queued", "error": None, "completed_at": None, "fault": None, "ended": None}
    return job.model_copy(update={**fresh, "results": results, "asks": kept})


def _chat(model: ChatModel, key: str, store: str) -> OpenAIChat:
    account = Account()
    client = EndpointClient(model.endpoint, model.model, f"serve.videos.refine.{key}.endpoint", account)
    client.read_key()
    answers = Answers(model.endpoint.answers or join(store, "answers"), store)
    return OpenAIChat(model, client, answers, account)


class RefineDesk:
    """What an ingress does for these jobs.

    Args:
        jobs: handle of `RefinementJobs`.
    """

    def __init__(self, settings: Serve, jobs: DeploymentHandle) -> None:
        assert settings.videos is not None
        self.settings, self.handle = settings, jobs
        self.names, self.jobs = Refinements(settings), refinement_files(settings.videos.store)

    async def ask(self, asked: Asked, key: Key, take: Take, image: GivenImage | None = None) -> Response:
        """202 with the job. It takes its videos from the key's limits, and one prompt where an earlier one
        has the answer, or is at work on it.

        Raises:
            ApiError: 403 for a key that may ask for no videos, 429 or 413 over its limits.
        """
        if "videos" not in key.scopes:
            message = "effort videos makes videos, and this key may not: its scopes lack videos"
            raise ApiError(403, message, "effort", "scope_missing")
        assert asked.budget is not None
        [query], [flags] = asked.queries, asked.flags
        name = self.names.name(query, flags, asked.budget, image.name if image is not None else None)
        known = await asyncio.to_thread(self.jobs.read, name)
        take(asked.budget if known is None or known.status == "failed" else 1)
        given: list[Mapping[str, Any]] = [flag.model_dump() for flag in flags]
        kept = await keep_image(self.settings, image)
        job = await self.handle.submit.remote(query, given, asked.budget, key.name, kept)
        if job is None:
            raise overloaded(self.settings.overload_status)
        return Response(job, 202, media_type="application/json")

    async def find(self, job_id: str, key: Key) -> Refinement:
        """A job that this caller asked for. Raises ApiError (404) for another."""
        job = await asyncio.to_thread(self.jobs.read, job_id)
        if job is None or key.name not in job.owners:
            raise ApiError(404, f"there is no search {job_id[:100]!r}", code="refinement_not_found")
        return job.shown()
