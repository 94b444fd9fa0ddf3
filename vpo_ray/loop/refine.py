"""`vpo refine`: the prompts of one query, evolved now; the best that a budget of videos finds, and a trace.

A query has a run directory of its own, `<out>/refined/<id>`, whose name says all that the result depends on.
Asked again, it is read from there: nothing is paid for twice, and what was stopped goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vpo_ray.engines.video.image_need import image_need
from vpo_ray.files.folder import join
from vpo_ray.files.image_files import MAX_BYTES, ImageError, image_hash, image_name
from vpo_ray.files.input_files import READ_ERRORS, file_at, why_unreadable
from vpo_ray.loop.evolution import Evolving
from vpo_ray.loop.opening import accounted, opened, write_ledger
from vpo_ray.loop.policies import LoopError
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Evolve, Recipe
from vpo_ray.records import Row, content_id, normalise, query_id
from vpo_ray.stages.evolution import NONE_BETTER, videos_of
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import CURATED, RunDir
from vpo_ray.stream.connection import connect

_SECTIONS = ("seed", "evolve", "judge", "render", "reward", "more_rewards", "gate")


@dataclass(frozen=True)
class Refined:
    """What the evolution of one query found.

    Args:
        prompt: the best; the query itself, where no prompt is better.
        fault: why it is the query itself.
        ended: why the evolution ended.
        trace: rows of EVOLUTION, the query first.
        folder: URI of the run directory.
    """

    query: str
    prompt: str
    fault: str | None
    ended: str | None
    trace: Sequence[Row]
    folder: str

    @property
    def videos(self) -> int:
        return videos_of(self.trace)


def refine(
    recipe: Recipe,
    query: str,
    budget: int,
    retry_errors: bool = False,
    verbose: bool = False,
    image: str | None = None,
) -> Refined:
    """Evolve the prompts of one query, or read what was found for it before.

    Args:
        budget: videos at most, the query's own among them.
        image: path or URI of the query's image.
        retry_errors: take prompts that failed once more.
        verbose: see `connection.connect`.

    Raises:
        LoopError: the query is empty, its image cannot be read or is none that the video model takes, or no
            prompt of it passes; the message counts why.
        PlacementError, GenerationError, OtherRecipeError: see `streams.through`.
    """
    text = normalise(query)
    if not text:
        raise LoopError("the query is empty")
    name, data = (None, b"") if image is None else _read(image)
    _check_need(recipe, image)
    digest = None if name is None else image_hash(name)
    own = of_query(recipe, text, budget, digest)
    with opened(own) as run, accounted(own, run):
        if not run.exists(CURATED):
            if name is not None:
                images_of(run).keep(name, data)
            identity = {"query_id": query_id(text, digest), "query": text, "image": name}
            run.table("queries").append([{**identity, "source": "refine", "split": "sft"}])
            run.write_json(CURATED, {"queries": 1, "dropped": 0})
        evolving = Evolving(own, run)
        if retry_errors or not evolving.is_done():
            connect(verbose)
            evolving.run_all(retry_errors)
            write_ledger(own, run)
        return _found(text, run, list(evolving.rows()))


def _read(image: str) -> tuple[str, bytes]:
    """Name and bytes of an image. Raises LoopError."""
    try:
        with file_at(image).open() as stream:
            data = stream.read(MAX_BYTES + 1)
        return image_name(data), data
    except ImageError as error:
        raise LoopError(f"image {image}: {error}") from None
    except READ_ERRORS as error:
        raise LoopError(f"image {image}: {why_unreadable(error)}") from error


def _check_need(recipe: Recipe, image: str | None) -> None:
    """Raises LoopError where the video model takes no image and there is one, or the other way round."""
    need, model = image_need(recipe.render.located()), recipe.render.model or recipe.render.kind
    if image is not None and need == "none":
        raise LoopError(f"image {image}: {model} makes videos from text alone; leave the image out")
    if image is None and need == "required":
        raise LoopError(f"{model} makes videos from images: give the query's (vpo refine --image FILE)")


def of_query(recipe: Recipe, query: str, budget: int, image: str | None) -> Recipe:
    """The recipe of the query's run directory.

    Args:
        image: the hash of the query's image.
    """
    settings = (recipe.evolve or Evolve.model_validate({})).model_dump(exclude={"llm"})
    llm = recipe.evolve.llm if recipe.evolve is not None else None
    asked = Evolve.model_validate({**settings, "llm": llm, "budget": budget})
    store = recipe.render.store or RunDir(recipe.out).at("videos")
    own = recipe.model_copy(
        update={
            "evolve": asked,
            "render": recipe.render.model_copy(update={"store": store, "strategy": "all", "preview": None}),
            "sft": None,
            "dpo": None,
            "rl": None,
            "evaluate": None,
        }
    )
    words = [read_prompt(name) for name in (asked.prompt, recipe.judge.critique_prompt)]
    identity = content_id("refined", query_id(query, image), own.fingerprint(*_SECTIONS), words)
    return own.model_copy(update={"out": join(RunDir(recipe.out).uri, f"refined/{identity}")})


def _found(query: str, run: RunDir, trace: list[Row]) -> Refined:
    best = next((row["prompt"] for row in trace if row["target"]), None)
    fault, ended = trace[0]["fault"], trace[0]["ended"]
    if best is None and fault != NONE_BETTER:
        reasons = Counter(f"{row['error_stage']}: {row['error']}" for row in trace if row["error"])
        reasons.update(
            f"judged {row['verdict']}" for row in trace[1:] if row["verdict"] not in (None, "aligned")
        )
        reasons.update(row["skipped"] for row in trace if row["skipped"] is not None)
        listed = "".join(f"\n  {count:3} {reason}" for reason, count in reasons.most_common())
        raise LoopError(f"no prompt was found: {fault}{listed}\nThe trace is in {run.at('evolutions')}")
    return Refined(query, best or query, fault, ended, trace, run.uri)
