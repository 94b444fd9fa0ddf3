"""A diffusers text- or image-to-video model: which one it is, how it is loaded, what settings it takes.

Everything that can be refused is refused here, before the first render and by the name of the
recipe's key: a folder that is no such pipeline, a missing component, a number of frames
or a size that the model would round, an option that its pipeline does not have.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vpo_ray.engines.video.components import language_models, only_variant, refuse_unloaded
from vpo_ray.engines.video.ranks import rank_device, split_sequence
from vpo_ray.engines.video.weights import VideoModelError, add_lora, quantise
from vpo_ray.recipe import Render

# Settings of a recipe and the arguments of a pipeline's `__call__` that take them, first match wins.
# LTX reads the frame rate into its position embedding, other pipelines have no such argument.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "steps": ("num_inference_steps",),
    "guidance": ("guidance_scale",),
    "frames": ("num_frames", "video_length"),
    "height": ("height",),
    "width": ("width",),
    "negative_prompt": ("negative_prompt",),
    "max_text_tokens": ("max_sequence_length",),
    "fps": ("frame_rate",),
}
_OPTIONAL = frozenset({"fps"})  # a property of the mp4 as well, so never refused
# What the engine itself passes to a pipeline.
_OWN = frozenset(
    {"self", "prompt", "image", "generator", "output_type", "return_dict", "callback_on_step_end"}
)
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
_CACHES = {
    "first_block": "FirstBlockCacheConfig",
    "faster": "FasterCacheConfig",
    "pyramid": "PyramidAttentionBroadcastConfig",
    "taylorseer": "TaylorSeerCacheConfig",
}


def load_pipeline(settings: Render) -> Any:
    """The pipeline on its device with every option applied.

    The model's index is checked before any weight is read.

    Raises:
        VideoModelError: see the module's text; the message names the key of the recipe.
    """
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    where = f"render.model {settings.model!r}"
    index = _check_index(settings, where)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    dtype: Any = getattr(torch, settings.dtype)
    if settings.vae_dtype is not None:
        dtype = {"default": dtype, "vae": getattr(torch, settings.vae_dtype)}
    variant = only_variant(settings.model)
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            settings.model,
            revision=settings.revision,
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            variant=variant,
            **language_models(settings.model, settings.revision, index, dtype, variant),
        )
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        if isinstance(error, VideoModelError):
            raise
        raise VideoModelError(f"{where} cannot be loaded: {error}") from error
    refuse_unloaded(settings.model, pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    # Pipelines log the text that they cut off a prompt; here it is counted instead.
    logging.getLogger(type(pipeline).__module__).setLevel(logging.ERROR)
    _check_shape(pipeline, settings)
    _set_scheduler(pipeline, settings)
    _set_vae(pipeline, settings)
    if settings.lora is not None:
        add_lora(pipeline, settings.lora)
    device = _device(settings)
    if settings.context_parallel > 1:
        device = rank_device(device)
    if settings.quantize is not None:
        for model in _denoisers(pipeline):
            quantise(model, settings.quantize, device)
    _set_speed(pipeline, settings)
    return _place(pipeline, settings, device)


def call_arguments(pipeline: type, settings: Render) -> dict[str, Any]:
    """The settings as keyword arguments of this pipeline's call.

    Raises:
        VideoModelError: a setting that the pipeline does not have.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    arguments: dict[str, Any] = {}
    for setting, names in _ARGUMENTS.items():
        value = getattr(settings, setting)
        if value is None:
            continue
        name = next((n for n in names if n in parameters), None)
        if name is not None:
            arguments[name] = value
        elif setting not in _OPTIONAL:
            raise VideoModelError(f"render.{setting}: {pipeline.__name__} has no such option ({names[0]})")
    free = parameters.keys() - _OWN - arguments.keys()
    if unknown := sorted(settings.call_options.keys() - free):
        raise VideoModelError(
            f"render.call_options: {pipeline.__name__} has no {', '.join(unknown)} to set here; "
            f"it has {', '.join(sorted(free))}"
        )
    return arguments | settings.call_options


def image_input(pipeline: type) -> Literal["none", "optional", "required"]:
    """Whether a pipeline makes videos from an image. Some that cannot do without have it as None in their
    signature (LTX); their names say so."""
    image = inspect.signature(pipeline.__call__).parameters.get("image")
    if image is None:
        return "none"
    needed = image.default is inspect.Parameter.empty or "ImageToVideo" in pipeline.__name__
    return "required" if needed else "optional"


def text_tokens(pipeline: Any, settings: Render) -> int | None:
    """Tokens that the text encoder takes; None where the pipeline does not say.

    Raises:
        VideoModelError: another number than the transformer was built for.
    """
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    if parameter is None or getattr(pipeline, "tokenizer", None) is None:
        return None
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    most = config.get("max_text_seq_length")
    wanted: int = settings.max_text_tokens or parameter.default
    # Position embeddings that are not rotary are a table with one row for each token of text too.
    fixed = not config.get("use_rotary_positional_embeddings", True)
    if most is not None and (wanted > most or (fixed and wanted != most)):
        raise VideoModelError(
            f"render.max_text_tokens={wanted}: this model's transformer takes {most}; set that"
        )
    return wanted


def text_limit(pipeline: Any, settings: Render) -> int | None:
    """Tokens of a prompt that are read: as `text_tokens`, or what the tokenizer of an encoder with a fixed
    length takes (CLIP: 77). None where nothing says so."""
    taken = text_tokens(pipeline, settings)
    if taken is not None:
        return taken
    most = getattr(getattr(pipeline, "tokenizer", None), "model_max_length", None)
    # A tokenizer that has no limit says so by a huge number.
    return most if isinstance(most, int) and 0 < most < 10**6 else None


def _check_index(settings: Render, where: str) -> Mapping[str, Any]:
    """The pipeline's `model_index.json`; what is no text- or image-to-video one is refused by it alone."""
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(settings.model, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise VideoModelError(f"{where} is no diffusers pipeline with a model_index.json: {error}") from error
    if not isinstance(index, Mapping):
        raise VideoModelError(f"{where}: its model_index.json is no object with the names of components")
    name = index.get("_class_name")
    if not isinstance(name, str):
        if settings.trust_remote_code:
            return index
        raise VideoModelError(f"{where} brings its own code: set render.trust_remote_code if you trust it")
    pipeline = getattr(diffusers, name, None)
    if pipeline is None:
        raise VideoModelError(f"{where} is a {name}, which diffusers {diffusers.__version__} does not have")
    if name == "WanImageToVideoPipeline" and not diffusers.utils.is_ftfy_available():
        raise VideoModelError(f"{where} is a {name}, which needs one more package: pip install ftfy")
    parameters = inspect.signature(pipeline.__call__).parameters
    required = {name for name, p in parameters.items() if p.default is inspect.Parameter.empty}
    inputs = sorted(required & ({"video"} if "prompt" in parameters else {"image", "video"}))
    if "prompt" not in parameters or not any(a in parameters for a in _ARGUMENTS["frames"]) or inputs:
        needs = f" (it needs an input {inputs[0]})" if inputs else ""
        raise VideoModelError(f"{where} is a {name}, not a text- or image-to-video pipeline{needs}")
    call_arguments(pipeline, settings)
    folder = Path(settings.model)
    if folder.is_dir():
        # A component that a model does without is listed as [null, null].
        listed = [name for name, value in index.items() if isinstance(value, list) and any(value)]
        absent = [name for name in listed if not (folder / name).is_dir()]
        if absent:
            raise VideoModelError(f"{where} lacks the component {', '.join(absent)} of its model_index.json")
    return index


def _check_shape(pipeline: Any, settings: Render) -> None:
    """Refuse frames and sizes that the model would round or fail on, and say its rule."""
    name = type(pipeline).__name__
    temporal = _first(pipeline, _TEMPORAL)
    if temporal is not None:
        # CogVideoX decodes latent frames in pairs after the first one, so their number must be odd.
        if type(pipeline.vae).__name__ == "AutoencoderKLCogVideoX":
            temporal *= 2
        if (settings.frames - 1) % temporal:
            near = (settings.frames - 1) // temporal * temporal + 1
            rule = f"{name} takes {temporal}k+1 frames, such as {near} or {near + temporal}"
            raise VideoModelError(f"render.frames={settings.frames}: {rule}")
    spatial = _first(pipeline, _SPATIAL) or 1
    patch = getattr(getattr(getattr(pipeline, "transformer", None), "config", None), "patch_size", 1)
    multiple = spatial * (patch[-1] if isinstance(patch, list | tuple) else patch)
    for side in ("height", "width"):
        value = getattr(settings, side)
        if value % multiple:
            near = max(1, value // multiple) * multiple
            rule = f"{name} takes multiples of {multiple}, such as {near} or {near + multiple}"
            raise VideoModelError(f"render.{side}={value}: {rule}")


def _set_scheduler(pipeline: Any, settings: Render) -> None:
    import diffusers

    own = type(pipeline.scheduler)
    kind = own if settings.scheduler is None else getattr(diffusers, settings.scheduler, None)
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)):
        raise VideoModelError(
            f"render.scheduler: diffusers has no {settings.scheduler}; the model's is {own.__name__}"
        )
    options = settings.scheduler_options
    if unknown := sorted(options.keys() - inspect.signature(kind.__init__).parameters.keys()):
        raise VideoModelError(f"render.scheduler_options: {kind.__name__} has no option {', '.join(unknown)}")
    if options or kind is not own:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)  # type: ignore[attr-defined]


def _set_vae(pipeline: Any, settings: Render) -> None:
    for option in ("tiling", "slicing"):
        if getattr(settings, f"vae_{option}"):
            enable = getattr(pipeline.vae, f"enable_{option}", None)
            if enable is None:
                raise VideoModelError(f"render.vae_{option}: {type(pipeline.vae).__name__} has no {option}")
            enable()


def _set_speed(pipeline: Any, settings: Render) -> None:
    """Attention backend, cache and compilation of every network that denoises."""
    if settings.cache is None and settings.cache_options:
        raise VideoModelError("render.cache_options has no effect without render.cache: name a cache")
    for model in _denoisers(pipeline):
        name = type(model).__name__
        if settings.attention is not None:
            try:
                model.set_attention_backend(settings.attention)
            except (AttributeError, ValueError, RuntimeError, ImportError) as error:
                raise VideoModelError(f"render.attention={settings.attention}: {name}: {error}") from error
        if settings.cache is not None:
            _enable_cache(model, pipeline, settings)
        if settings.context_parallel > 1:
            split_sequence(model, settings.context_parallel, _tokens(pipeline, model, settings))
        if settings.compile:
            _compile(model)


def _enable_cache(model: Any, pipeline: Any, settings: Render) -> None:
    where = f"render.cache={settings.cache}: {type(model).__name__}"
    if not hasattr(model, "enable_cache"):
        raise VideoModelError(f"{where} has no caches")
    try:
        model.enable_cache(_cache_config(pipeline, settings))
    except (AttributeError, ValueError) as error:
        raise VideoModelError(f"{where}: {error}") from error
    # A cache that finds no module by the names that it knows does nothing, and says nothing.
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    if not any(registry is not None and registry.hooks for registry in registries):
        raise VideoModelError(f"{where} has no module that it would cache; name them in render.cache_options")


def _cache_config(pipeline: Any, settings: Render) -> Any:
    import diffusers

    kind = getattr(diffusers, _CACHES[str(settings.cache)])
    parameters = inspect.signature(kind).parameters
    if unknown := sorted(settings.cache_options.keys() - parameters.keys()):
        raise VideoModelError(f"render.cache_options: {kind.__name__} has no option {', '.join(unknown)}")
    if settings.cache == "first_block" and settings.batch_size > 1:
        # It skips blocks for a whole batch by the batch's mean, so neighbours would change pixels.
        raise VideoModelError("render.cache=first_block decides for whole batches: set render.batch_size=1")
    options = dict(settings.cache_options)
    if "current_timestep_callback" in parameters:
        options["current_timestep_callback"] = lambda: pipeline.current_timestep
    return kind(**options)


def _compile(model: Any) -> None:
    """Compile the blocks that repeat: as fast as the whole, and compiled in a fraction of the time."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks()
        return
    blocks = getattr(model, "transformer_blocks", None)
    if blocks is None:
        raise VideoModelError(f"render.compile: {type(model).__name__} has no repeated blocks to compile")
    for block in blocks:
        block.compile()


def _device(settings: Render) -> str:
    import torch

    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tokens(pipeline: Any, model: Any, settings: Render) -> list[int]:
    """Lengths of the sequences of video and text that the network sees."""
    patch = model.config.patch_size
    frames, height, width = patch if isinstance(patch, list | tuple) else (1, patch, patch)
    temporal, spatial = _first(pipeline, _TEMPORAL) or 1, _first(pipeline, _SPATIAL) or 1
    latents = (settings.frames - 1) // temporal + 1
    rows, columns = settings.height // spatial // height, settings.width // spatial // width
    text = text_tokens(pipeline, settings)
    return [latents // frames * rows * columns, *([] if text is None else [text])]


def _place(pipeline: Any, settings: Render, device: str) -> Any:
    if settings.offload == "none":
        return pipeline.to(device)
    if device == "cpu":
        raise VideoModelError(f"render.offload={settings.offload}: there is no accelerator to offload from")
    getattr(pipeline, f"enable_{settings.offload}_cpu_offload")(device=device)
    return pipeline


def _denoisers(pipeline: Any) -> list[Any]:
    parts = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2", "unet"))
    return [part for part in parts if part is not None]


def _first(pipeline: Any, names: tuple[str, ...]) -> int | None:
    return next((getattr(pipeline, name) for name in names if hasattr(pipeline, name)), None)
