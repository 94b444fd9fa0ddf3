"""Renders prompts with any diffusers text-to-video pipeline, and turns frames into mp4 bytes.

This module knows diffusers and PyAV, and neither Ray nor records: `stages/render.py` calls it. The
noise of each video comes from its own generator on the CPU, so that neither the batch size nor the
number of replicas decides what a seed looks like; only floating point rounding differs.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpo_ray import recipe
from vpo_ray.records import content_id

log = logging.getLogger(__name__)

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
_SAMPLE = 4096  # bytes read at each of
_SAMPLES = 64  # places in a large file of a model's folder
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")


class VideoModelError(ValueError):
    """A model or a setting that cannot render at all: the run should stop, not the row."""


class RenderError(RuntimeError):
    """One prompt could not be rendered; the message is the reason that its row carries."""


class RenderTimeout(RenderError):
    """A render went over its time limit and was ended between two denoising steps."""


class VideoInfo(NamedTuple):
    """What an mp4 holds: number of frames, frames a second, and the size in pixels."""

    frames: int
    fps: float
    width: int
    height: int


class VideoEngine:
    """A loaded pipeline with the settings of one recipe.

    Raises:
        VideoModelError: the model is no text-to-video pipeline, lacks a component or cannot be
            loaded, or does not have (or cannot take) a setting; the message names it.
    """

    def __init__(self, settings: recipe.Render) -> None:
        self.settings = settings
        self.batch_size = settings.batch_size  # shrinks when memory runs out
        self.truncated = 0  # prompts cut to the text encoder's length so far
        self.pipeline = _load(settings)
        self._call = _call_arguments(type(self.pipeline), settings)
        _check_shape(self.pipeline, settings)
        self._text_tokens = _text_tokens(self.pipeline, settings)

    def render(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray | Exception]:
        """Render one video per prompt, in batches of at most `settings.batch_size`.

        Returns:
            For each prompt its frames, uint8 of shape (frames, height, width, 3), or the exception
            that says why there are none. One bad prompt does not spoil the others of its batch.

        Raises:
            torch.AcceleratorError: the device is in a state that only a new process clears.
        """
        import torch

        results: list[np.ndarray | Exception] = [RenderError("the prompt is empty")] * len(prompts)
        filled = [i for i, prompt in enumerate(prompts) if prompt.strip()]
        queue = deque(filled[i : i + self.batch_size] for i in range(0, len(filled), self.batch_size))
        while queue:
            batch = queue.popleft()
            try:
                videos = self._render_batch([prompts[i] for i in batch], [seeds[i] for i in batch])
            except torch.AcceleratorError:
                raise
            except RenderTimeout as error:
                videos = [error] * len(batch)
            except Exception as error:  # noqa: BLE001 - whatever a pipeline raises is this row's failure
                if len(batch) == 1:
                    videos = [_reason(error)]
                else:
                    queue.extendleft(reversed(self._smaller(batch, error)))
                    continue
            for index, video in zip(batch, videos, strict=True):
                results[index] = video
        return results

    def _smaller(self, batch: list[int], error: Exception) -> list[list[int]]:
        """Halves of a batch that ran out of memory, single rows of one that failed otherwise."""
        size = 1
        if _out_of_memory(error):
            self.batch_size = size = (len(batch) + 1) // 2
            _free_memory()
            log.warning("out of memory with %d videos at once; going on with %d", len(batch), size)
        else:
            log.warning("a batch of %d failed (%s); rendering its rows one by one", len(batch), error)
        return [batch[i : i + size] for i in range(0, len(batch), size)]

    def _render_batch(self, prompts: list[str], seeds: list[int]) -> list[np.ndarray | Exception]:
        import torch

        self._count_truncated(prompts)
        arguments = dict(self._call)
        limit = self.settings.time_limit_s * len(prompts)
        if "callback_on_step_end" in inspect.signature(type(self.pipeline).__call__).parameters:
            arguments["callback_on_step_end"] = _deadline(limit)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        try:
            output = self.pipeline(prompt=prompts, generator=generators, output_type="pt", **arguments)
        except RenderTimeout:
            self.pipeline.maybe_free_model_hooks()
            raise
        return [self._frames(video) for video in output.frames]

    def _frames(self, video: Any) -> np.ndarray | Exception:
        """(T, 3, H, W) floats in [0, 1] on any device to (T, H, W, 3) uint8, or what is wrong."""
        import torch

        shape = (self.settings.frames, 3, self.settings.height, self.settings.width)
        if tuple(video.shape) != shape:
            return RenderError(f"the pipeline returned a video of shape {tuple(video.shape)}, not {shape}")
        video = video.float()
        if not torch.isfinite(video).all():
            return RenderError(f"the pipeline returned NaN pixels (render.dtype={self.settings.dtype})")
        pixels = (video * 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        if not pixels.any():
            return RenderError("every pixel is black: a safety checker's refusal, or an overflow in the VAE")
        return pixels

    def _count_truncated(self, prompts: list[str]) -> None:
        if self._text_tokens is None:
            return
        lengths = [len(ids) for ids in self.pipeline.tokenizer(prompts, verbose=False).input_ids]
        over = [length for length in lengths if length > self._text_tokens]
        if over:
            self.truncated += len(over)
            log.warning(
                "%d prompt(s), the longest of %d tokens, cut to the text encoder's %d tokens; %d so far",
                *(len(over), max(over), self._text_tokens, self.truncated),
            )


def model_identity(model: str, revision: str | None) -> str:
    """What a model's weights are, whatever path or branch name leads to them.

    A folder is its files: names, sizes, the whole of every small file and 64 samples of every large
    one (training moves every weight, so samples tell two trainings apart without reading 20 GB).
    A hub id is its commit, from the local cache or the hub.

    Raises:
        VideoModelError: no such folder, and the hub cannot say either.
    """
    folder = Path(model)
    if folder.is_dir():
        files = {
            path.relative_to(folder).as_posix(): path for path in folder.rglob("[!.]*") if path.is_file()
        }
        return "folder:" + content_id([[name, *_sampled(path)] for name, path in sorted(files.items())])
    from huggingface_hub import hf_hub_download

    try:
        index = hf_hub_download(model, "model_index.json", revision=revision)
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are of these two kinds
        raise VideoModelError(
            f"render.model {model!r} is no folder here, nor had from the hub: {error}"
        ) from error
    return f"{model}@{Path(index).parent.name}"


def _sampled(path: Path) -> tuple[int, str]:
    """Size and hash of a file, or of samples of a large one."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _SAMPLE * _SAMPLES:
            digest.update(file.read())
        else:
            for place in range(_SAMPLES):
                file.seek(place * (size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return size, digest.hexdigest()


def _load(settings: recipe.Render) -> Any:
    """The pipeline on its device. Checks the model's index before any weight is read."""
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    where = f"render.model {settings.model!r}"
    _check_index(settings, where)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            settings.model,
            revision=settings.revision,
            dtype=getattr(torch, settings.dtype),
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise VideoModelError(f"{where} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    # Pipelines log the text that they cut off a prompt; here it is counted instead.
    logging.getLogger(type(pipeline).__module__).setLevel(logging.ERROR)
    if settings.scheduler is not None:
        pipeline.scheduler = _scheduler(settings.scheduler, pipeline.scheduler)
    for option in ("tiling", "slicing"):
        if getattr(settings, f"vae_{option}"):
            enable = getattr(pipeline.vae, f"enable_{option}", None)
            if enable is None:
                raise VideoModelError(f"render.vae_{option}: {type(pipeline.vae).__name__} has no {option}")
            enable()
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return pipeline.to(device)


def _check_index(settings: recipe.Render, where: str) -> None:
    """Refuse what is no text-to-video pipeline from its `model_index.json` alone."""
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(settings.model, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise VideoModelError(f"{where} is no diffusers pipeline with a model_index.json: {error}") from error
    name = index.get("_class_name")
    if not isinstance(name, str):
        if settings.trust_remote_code:
            return
        raise VideoModelError(f"{where} brings its own code: set render.trust_remote_code if you trust it")
    pipeline = getattr(diffusers, name, None)
    if pipeline is None:
        raise VideoModelError(f"{where} is a {name}, which diffusers {diffusers.__version__} does not have")
    parameters = inspect.signature(pipeline.__call__).parameters
    required = {name for name, p in parameters.items() if p.default is inspect.Parameter.empty}
    inputs = sorted(required & {"image", "video"})
    if "prompt" not in parameters or not any(a in parameters for a in _ARGUMENTS["frames"]) or inputs:
        needs = f" (it needs an input {inputs[0]})" if inputs else ""
        raise VideoModelError(f"{where} is a {name}, not a text-to-video pipeline{needs}")
    _call_arguments(pipeline, settings)
    folder = Path(settings.model)
    if folder.is_dir():
        # A component that a model does without is listed as [null, null].
        listed = [
            name for name, value in index.items() if isinstance(value, list) and value[:1] not in ([], [None])
        ]
        absent = [name for name in listed if not (folder / name).is_dir()]
        if absent:
            raise VideoModelError(f"{where} lacks the component {', '.join(absent)} of its model_index.json")


def _scheduler(name: str, own: Any) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)):
        example = type(own).__name__
        raise VideoModelError(
            f"render.scheduler: diffusers has no scheduler {name} (this model's is {example})"
        )
    return kind.from_config(own.config)  # type: ignore[attr-defined]


def _call_arguments(pipeline: type, settings: recipe.Render) -> dict[str, Any]:
    """The settings as keyword arguments of this pipeline; refuses those that it does not have."""
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
    return arguments


def _check_shape(pipeline: Any, settings: recipe.Render) -> None:
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


def _text_tokens(pipeline: Any, settings: recipe.Render) -> int | None:
    """Tokens that the text encoder takes; None where the pipeline does not say."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    if parameter is None or getattr(pipeline, "tokenizer", None) is None:
        return None
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    most = config.get("max_text_seq_length")
    wanted = settings.max_text_tokens or parameter.default
    if most is not None and wanted != most:
        raise VideoModelError(
            f"render.max_text_tokens={wanted}: this model's transformer takes {most}; set that"
        )
    return wanted


def _first(pipeline: Any, names: tuple[str, ...]) -> int | None:
    return next((getattr(pipeline, name) for name in names if hasattr(pipeline, name)), None)


def _deadline(seconds: float) -> Callable[..., dict[str, Any]]:
    """A step callback that ends the pipeline call once the time is over."""
    start = time.monotonic()

    def check(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        spent = time.monotonic() - start
        if spent > seconds:
            raise RenderTimeout(f"over the limit of {seconds:g} s at step {step + 1} (render.time_limit_s)")
        return tensors

    return check


def _out_of_memory(error: Exception) -> bool:
    import torch

    said = any(sign in str(error) for sign in ("can't allocate memory", "ALLOC_FAILED"))
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: Exception) -> RenderError:
    advice = "out of memory for one video, try render.vae_tiling: " if _out_of_memory(error) else ""
    return RenderError(f"{advice}{type(error).__name__}: {error}")


def encode(frames: np.ndarray, fps: float, crf: int) -> bytes:
    """H.264 in an mp4, yuv420p; the same frames give the same bytes.

    Args:
        frames: uint8 of shape (T, H, W, 3). yuv420p needs even sides: an odd one is grown by one by
            repeating the last row or column.
        fps: frames a second.
        crf: x264's constant rate factor, 0 (no loss after the conversion to yuv420p, which halves
            the resolution of colour) to 51 (worst). Few browsers play crf 0.

    Raises:
        ValueError: the frames have another shape or type.
    """
    import av

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames are uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "medium"}
        stream.thread_count = 1  # x264 divides its work, and so its choices, by the number of threads
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def probe(data: bytes) -> VideoInfo:
    """Decode every frame of an mp4. Raises ValueError for what is no whole video."""
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise ValueError("no video stream in these bytes")
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            if frames == 0 or frames != stream.frames:
                raise ValueError(f"{frames} frames can be decoded of {stream.frames}")
            return VideoInfo(frames, float(stream.average_rate), stream.width, stream.height)
    except av.FFmpegError as error:
        raise ValueError(f"not a video: {error}") from error
