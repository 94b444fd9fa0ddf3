"""What `/v1/optimize` answers with effort `videos`: a job that looks for the best prompt of a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from vpo_ray.files.folder import Folder
from vpo_ray.files.image_files import image_hash
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import RecipeError, Serve, result_keys
from vpo_ray.records import Row, content_id, query_id
from vpo_ray.serve.job_files import JobFiles, JobState
from vpo_ray.serve.optimize_schema import GeneratorFlag, SafetyOutcome


class TriedPrompt(BaseModel):
    """A prompt of the trace, the query itself in round 0. The text of an unsafe one is not given."""

    round: int
    prompt: str | None
    verdict: str | None
    # Why no video was made of it, and the gate or threshold that its video does not pass.
    skipped: str | None
    refused: str | None
    fitness: float | None
    dimensions: dict[str, float] | None
    best: bool
    error: str | None


class Refinement(JobState):
    """A job as its callers see it. `prompt` is the query itself where none is better, and `fault` says so."""

    object: Literal["refinement"] = "refinement"
    model: str
    query: str
    # SHA-256 and kind of the query's picture.
    image: str | None = None
    flags: list[GeneratorFlag] = Field(default=[])
    budget: int
    prompt: str | None = None
    changed: bool = False
    fault: str | None = None
    ended: str | None = None
    safety: SafetyOutcome = SafetyOutcome()
    # So far: videos that were asked for, and the price of the LLMs' answers and of a service's videos.
    videos: int = 0
    cost: float = 0
    trace: list[TriedPrompt] = Field(default=[])


class StoredRefinement(Refinement):
    """A job as it is stored: with the names of the keys that may see it, what the LLM wrote, and what became
    of each prompt, by its id. Of these the evolution goes on."""

    owners: list[str] = Field(default=[])
    asks: list[dict[str, Any]] = Field(default=[])
    results: dict[str, dict[str, Any]] = Field(default={})

    def shown(self) -> Refinement:
        return Refinement(**self.model_dump(exclude={"owners", "asks", "results"}))


def traced(row: Row) -> TriedPrompt:
    """An EVOLUTION row as callers see it."""
    parts = {part["name"]: part["score"] for part in row["dimensions"] or []} or None
    known = {name: row[name] for name in ("round", "verdict", "skipped", "refused", "fitness", "error")}
    prompt = None if row["round"] and row["verdict"] == "unsafe" else row["prompt"]
    return TriedPrompt(**known, prompt=prompt, dimensions=parts, best=bool(row["target"]))


def refinement_files(store: str) -> JobFiles[StoredRefinement]:
    """The jobs' files, in a video store."""
    return JobFiles(Folder(store) / "refinements", StoredRefinement)


class Refinements:
    """Names jobs by all that their result depends on, so that equal queries are one job.

    Raises:
        RecipeError: the settings lack a part, or an LLM is not behind an endpoint.
        PromptError: a prompt of the settings cannot be read.
    """

    def __init__(self, settings: Serve) -> None:
        videos = settings.videos
        refine = videos.refine if videos is not None else None
        if videos is None or refine is None:
            raise RecipeError("serve.videos.refine is missing")
        if videos.render is None or videos.reward is None or refine.judge is None:
            raise RecipeError("serve.videos.refine needs a recipe with the sections render, reward and judge")
        writer = refine.evolve.llm if refine.evolve is not None else None
        for key, llm in {"judge": refine.judge, "evolve.llm": writer}.items():
            if llm is not None and llm.backend != "openai":
                raise RecipeError(
                    f"serve.videos.refine: {key} has backend: {llm.backend}; while serving, LLMs that judge "
                    f"and write are asked over HTTP: give serve.videos.refine.{key} with backend: openai"
                )
        sections = {
            "render": videos.render,
            "reward": videos.reward,
            "judge": refine.judge,
            **({"evolve": refine.evolve} if refine.evolve is not None else {}),
            **{f"more_rewards.{name}": reward for name, reward in (refine.more_rewards or {}).items()},
        }
        dumped = {k: v.model_dump(mode="json", exclude_defaults=True) for k, v in sections.items()}
        words = [read_prompt(name) for name in (evolve_prompt(settings), refine.judge.critique_prompt)]
        self.settings = content_id("refinements", result_keys(dumped), words)

    def name(self, query: str, flags: Sequence[GeneratorFlag], budget: int, image: str | None = None) -> str:
        """The id of a query's job.

        Args:
            image: the name of the query's image.
        """
        digest = None if image is None else image_hash(image)
        parts = [query_id(query, digest), [flag.model_dump() for flag in flags], budget]
        return f"refine{content_id('refinement', self.settings, *parts)}"


def evolve_prompt(settings: Serve) -> str:
    """The name of the prompt that asks for new ones."""
    refine = settings.videos.refine if settings.videos is not None else None
    evolve = refine.evolve if refine is not None else None
    return evolve.prompt if evolve is not None else "builtin:evolve"
