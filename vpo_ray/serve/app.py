"""The Serve application: vLLM's deployment of `ray.serve.llm` behind our own HTTP ingress.

`vpo serve CHECKPOINT` runs it; an OpenAI client then gets the optimised prompt for a raw query by
changing its `base_url`. Ray's own tools take it as `vpo_ray.serve.app:app`:

    serve run vpo_ray.serve.app:app checkpoint=runs/laptop/checkpoints/dpo
"""

import logging
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.deployment import Application

from vpo_ray.engines.chat.eyes import checkpoint_has_eyes
from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.files.folder import Folder
from vpo_ray.files.weight_files import folder_problems
from vpo_ray.prompts.policy_prompt import PromptError, control_tokens
from vpo_ray.recipe import Pool, RecipeError, Section, Serve
from vpo_ray.serve.config import operation
from vpo_ray.serve.ingress import Ingress
from vpo_ray.serve.refine_schema import Refinements
from vpo_ray.serve.refinements import RefinementJobs
from vpo_ray.serve.video_jobs import VideoJobs, VideoRenderer, VideoScorer
from vpo_ray.train.model_files import marker

logger = logging.getLogger("ray.serve")

# Light replicas that mostly wait; the engine's queue is the limit.
INGRESS_REQUESTS = 4096
_OWNER: dict[str, Any] = {"max_ongoing_requests": INGRESS_REQUESTS, "ray_actor_options": {"num_cpus": 0}}


class Arguments(Section):
    """Arguments of `serve run`, and `args` of a Serve config file. `files` is a fingerprint of the
    checkpoint's files, so that Serve sees a new version when they change in place."""

    checkpoint: str
    files: str | None = None
    serve: Serve = Serve()


# Ray reads the annotation to parse the arguments, so it must not be postponed.
def app(arguments: Arguments) -> Application:
    """The application for Ray's own tools; see `build_app`."""
    return build_app(arguments.checkpoint, arguments.serve)


def build_app(checkpoint: str, settings: Serve) -> Application:
    """The application of one checkpoint, and of a canary where the settings name one.

    Args:
        checkpoint: a folder or URI as training leaves it: weights, or an adapter that names its base
            model, and a tokenizer whose chat template holds the task prompt. Replicas fetch a URI.

    Raises:
        PromptError: no such folder, no checkpoint in it, or no task prompt in its chat template.
        StorageError: a URI that cannot be read.
        AdapterError: an adapter's settings cannot be used.
        RecipeError: serve.images is `show`, and a checkpoint cannot see.
    """
    place, control = _checked(checkpoint)
    settings = as_seen(checkpoint, as_learnt(checkpoint, settings))
    main = _policy(place, settings)
    canary = None
    if settings.canary is not None:
        beside, more = _checked(settings.canary.checkpoint)
        canary = _policy(beside, settings, name_prefix="Canary:")
        control = tuple(dict.fromkeys((*control, *more)))
    return ingress_app(main, canary, settings, control)


def _policy(place: str, settings: Serve, **options: Any) -> Application:
    """The engine's replicas. They alone, and who deploys them, need vLLM."""
    from ray.serve.llm import build_llm_deployment

    from vpo_ray.serve.engine import PolicyServer, llm_config

    return build_llm_deployment(llm_config(place, settings), deployment_cls=PolicyServer, **options)


def as_learnt(checkpoint: str, settings: Serve) -> Serve:
    """The settings with what the recipe leaves to the checkpoint: whether its policy is told of wishes, and
    the fields of captions in JSON. With a canary, both have to have learnt them.

    Raises:
        StorageError: a URI that cannot be read.
    """
    folders = [checkpoint, *([settings.canary.checkpoint] if settings.canary is not None else [])]
    learnt = [(marker(folder) or {}).get("profiles") or {} for folder in folders]
    tell = all(learnt) if settings.tell_wishes is None else settings.tell_wishes
    captions = [profile["fields"] for profile in learnt[0].values() if profile["format"] == "json"]
    fields = settings.caption_fields or next(iter(captions), None)
    return settings.model_copy(update={"tell_wishes": tell, "caption_fields": fields})


def as_seen(checkpoint: str, settings: Serve) -> Serve:
    """The settings, which then say whether the policy is shown images. Where nothing is said it is, if its
    checkpoint sees, and with a canary both do.

    Raises:
        RecipeError: images are to be shown to a checkpoint that cannot see.
        AdapterError, StorageError: its configuration cannot be read.
    """
    if settings.images == "ignore":
        return settings
    folders = [checkpoint, *([settings.canary.checkpoint] if settings.canary is not None else [])]
    for folder in folders:
        try:
            sees = checkpoint_has_eyes(folder)
        except OSError as error:  # the base model of an adapter may be on other machines alone
            if settings.images is None:
                logger.warning(
                    "no images are taken, as %s cannot be looked at (serve.images): %s", folder, error
                )
            sees = settings.images == "show"
        if not sees and settings.images == "show":
            raise RecipeError(
                f"serve.images: show, and {folder} cannot see: its config.json has no vision_config; serve a "
                "vision-language model, or leave serve.images out"
            )
        if not sees:
            return settings.model_copy(update={"images": "ignore"})
    return settings.model_copy(update={"images": "show"})


def ingress_app(main: Any, canary: Any, settings: Serve, control: tuple[str, ...]) -> Application:
    """The HTTP side, and videos where the settings name them.

    Args:
        main, canary: `PolicyServer` applications, or handles of running ones.

    Raises:
        RecipeError: videos without a video model.
    """
    jobs = refinements = None
    if settings.videos is not None:
        models = video_models(settings)
        jobs = video_app(main, canary, settings, control, models)
        if settings.videos.refine is not None:
            refinements = refine_app(main, canary, settings, control, models)
    ingress = serve.deployment(
        Ingress,
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=INGRESS_REQUESTS,
        ray_actor_options={"num_cpus": min(0.1, settings.pool.num_cpus)},
        **operation(settings),
    )
    return ingress.bind(main, canary, jobs, settings, control, refinements)


def video_models(settings: Serve) -> tuple[Application, Application | None]:
    """The replicas that render, and those that score, which all kinds of jobs share."""
    videos = settings.videos
    assert videos is not None
    if videos.render is None or (videos.score and videos.reward is None):
        missing = "render" if videos.render is None else "reward"
        raise RecipeError(f"serve.videos.{missing} is missing: give it, or a recipe with a {missing} section")
    render = videos.render.located()
    calls = render.endpoint.concurrency if render.kind == "openai" else 2
    renderer = serve.deployment(VideoRenderer, **_pool(render.pool, calls)).bind(render, videos.store)
    scorer = None
    refine = videos.refine
    if (videos.score or refine is not None) and videos.reward is not None:
        reward = videos.reward.located()
        rewards = refine.more_rewards if refine is not None else None
        more = {name: further.located() for name, further in (rewards or {}).items()}
        scorer = serve.deployment(VideoScorer, **_pool(reward.pool)).bind(reward, videos.store, more)
    return renderer, scorer


def video_app(
    main: Any, canary: Any, settings: Serve, control: tuple[str, ...], models: tuple[Any, Any] | None = None
) -> Application:
    """The jobs of `/v1/videos`. Raises RecipeError where a model is missing."""
    renderer, scorer = models or video_models(settings)
    assert settings.videos is not None
    jobs = serve.deployment(VideoJobs, **_OWNER)
    return jobs.bind(main, canary, renderer, scorer if settings.videos.score else None, settings, control)


def refine_app(
    main: Any, canary: Any, settings: Serve, control: tuple[str, ...], models: tuple[Any, Any]
) -> Application:
    """The jobs of `/v1/optimize` with effort `videos`.

    Raises:
        RecipeError, PromptError: see `Refinements`.
    """
    Refinements(settings)
    return serve.deployment(RefinementJobs, **_OWNER).bind(main, canary, *models, settings, control)


def _pool(pool: Pool, calls: int = 2) -> dict[str, Any]:
    """A deployment's options from a recipe's pool. Two concurrent calls: one on the device while the other's
    video is encoded."""
    scaling = {"min_replicas": pool.size[0], "max_replicas": pool.size[1], "target_ongoing_requests": calls}
    size = {"num_replicas": pool.size[0]} if pool.size[0] == pool.size[1] else {"autoscaling_config": scaling}
    options: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
    options |= {"resources": pool.resources} if pool.resources else {}
    options |= {"accelerator_type": pool.accelerator_type} if pool.accelerator_type else {}
    # A job outlives a replica, so that no replica has to drain, or needs room for its successor.
    return {**size, "max_ongoing_requests": calls, "ray_actor_options": options}


def _checked(checkpoint: str) -> tuple[str, tuple[str, ...]]:
    """A checkpoint's absolute path or URI, and its control tokens."""
    place = Folder(checkpoint)
    files = [name for name in place.files() if "/" not in name]
    if not {"config.json", "adapter_config.json"} & set(files):
        what = "does not exist"
        if files:
            what = "is not a checkpoint: it has no config.json or adapter_config.json"
        raise PromptError(f"{checkpoint} {what}; give the folder that training wrote")
    if not any(name.endswith(".safetensors") for name in files):
        raise PromptError(
            f"{checkpoint} holds no weights (*.safetensors); give the folder that training wrote"
        )
    if place.is_local and (problems := list(folder_problems(Path(place.path)))):
        raise PromptError("; ".join(problems))
    return place.uri, control_tokens(load_tokenizer(place.uri))
