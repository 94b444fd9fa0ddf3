"""Renders prompts with any diffusers text- or image-to-video pipeline, and turns frames into mp4 bytes.

This module knows diffusers and PyAV, and neither Ray nor records: `stages/render.py` calls it. The
noise of each video comes from its own generator on the CPU, so that neither the batch size nor the
number of replicas decides what a seed looks like; only floating point rounding differs. In float32
that is at most one of a pixel's 255 levels between batches of 1 and 4 (the tests hold every model to
it); in 16 bits it grows over the steps and is the model's own.
"""

from __future__ import annotations

import inspect
import io
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vpo_ray.engines.endpoint.account import Account
from vpo_ray.engines.video import DeviceLostError, Prepared, RenderError, VideoModel
from vpo_ray.engines.video.model import call_arguments, image_input, load_pipeline, text_limit
from vpo_ray.engines.video.ranks import Denoise, Order, RankLostError, Ranks, decided, reason
from vpo_ray.engines.video.weights import on_node, weights_identity
from vpo_ray.files.image_files import cover
from vpo_ray.recipe import Render

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_WARM_UP = "a cat"


class RenderTimeout(RenderError):
    """A render went over its time limit and was ended between two denoising steps."""


class VideoInfo(NamedTuple):
    """What an mp4 holds: number of frames, frames a second, and the size in pixels."""

    frames: int
    fps: float
    width: int
    height: int


def prepare(settings: Render, account: Account | None = None) -> Prepared:
    """The model of a recipe with `kind: diffusers`, on this node.

    Raises:
        VideoModelError: its folder is not there.
        StorageError: it is a URI that cannot be read.
    """
    # Once: a store whose model changes later changes neither what renders here nor its identity.
    here = on_node(settings)
    return Prepared(weights_identity(here), partial(VideoEngine, here))


class VideoEngine(VideoModel):
    """A loaded pipeline with the settings of one recipe.

    Args:
        settings: the recipe's render section. With `context_parallel` above 1 the engine starts the
            other ranks, and is their rank 0.

    Raises:
        VideoModelError: the model is no text- or image-to-video pipeline, lacks a component or cannot be
            loaded, or does not have (or cannot take) a setting; the message names it.
        StorageError: the model is a URI that cannot be read.
    """

    def __init__(self, settings: Render) -> None:
        self.settings = settings = on_node(settings)
        self.batch_size = settings.batch_size  # shrinks when memory runs out
        self.truncated = 0  # prompts cut to the text encoder's length so far
        self._warming = False
        self._ranks = Ranks(settings, _follower) if settings.context_parallel > 1 else None
        try:
            self.pipeline = load_pipeline(settings)
            self._call = call_arguments(type(self.pipeline), settings)
            self._text_tokens = text_limit(self.pipeline, settings)
            self._image_input = image_input(type(self.pipeline))
            if self._ranks is not None:
                self._ranks.wait_loaded()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """End the other ranks, if there are any; the engine renders nothing afterwards."""
        if self._ranks is not None:
            self._ranks.stop()
            self._ranks = None

    def warm_up(self) -> None:
        """Render a batch of two steps and drop it: what is compiled, allocated and chosen once is then
        there. `time_limit_s` does not hold, for compiling may take longer than a video.

        A model that cannot render will say so again for the rows that need it.

        Raises:
            DeviceLostError: the process must end.
        """
        self._warming = True
        number = self.batch_size if self._image_input != "required" else 1
        images = [_blank(self.settings) if self._image_input == "required" else None] * number
        results = self._rendered([_WARM_UP] * number, range(number), images)
        self._warming = False
        for result in results:
            if isinstance(result, Exception):
                log.warning("the warm-up render failed: %s", result)

    def render(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray | Exception]:
        """Render one video per prompt, in batches of at most `settings.batch_size`.

        Returns:
            For each prompt its frames, uint8 of shape (frames, height, width, 3), or the exception
            that says why there are none. One bad prompt does not spoil the others of its batch.

        Raises:
            DeviceLostError: the process must end.
        """
        return self._rendered(prompts, seeds, [None] * len(prompts))

    def animate(
        self, images: Sequence[Image], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[np.ndarray | Exception]:
        """As `render`, each prompt with its image: scaled to cover the video's size, its middle cut out. One
        video at a time, as not all pipelines take several images."""
        return self._rendered(prompts, seeds, images)

    def _rendered(
        self, prompts: Sequence[str], seeds: Sequence[int], images: Sequence[Image | None]
    ) -> list[np.ndarray | Exception]:
        results: dict[int, np.ndarray | Exception] = {}
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            if (refusal := self._refusal(prompt, image is not None)) is not None:
                results[i] = refusal
        accepted = [i for i in range(len(prompts)) if i not in results]
        size = self.batch_size if not any(images) else 1
        queue = deque(accepted[i : i + size] for i in range(0, len(accepted), size))
        while queue:
            batch = queue.popleft()
            image = images[batch[0]]
            videos = self._attempt([prompts[i] for i in batch], [seeds[i] for i in batch], image)
            if isinstance(videos, Exception):
                queue.extendleft(reversed(self._smaller(batch, videos)))
            else:
                results.update(zip(batch, videos, strict=True))
        return [results[i] for i in range(len(prompts))]

    def _attempt(
        self, prompts: list[str], seeds: list[int], image: Image | None
    ) -> list[np.ndarray | Exception] | Exception:
        """A result for each prompt, or what ended a batch of several that may do better in parts."""
        import torch

        try:
            return self._render_batch(prompts, seeds, image)
        except torch.AcceleratorError as error:
            raise DeviceLostError(reason(error)) from error
        except RankLostError as error:
            raise DeviceLostError(str(error)) from error
        except RenderTimeout as error:
            return [error] * len(prompts)
        except Exception as error:  # noqa: BLE001 - whatever a pipeline raises is these rows' failure
            # Without its traceback, whose frames would keep the tensors of this batch in memory.
            failure = error.with_traceback(None)
            return failure if len(prompts) > 1 else [_reason(failure)]

    def _refusal(self, prompt: str, has_image: bool) -> RenderError | None:
        """Why this prompt is not rendered; a long one is cut and counted, or refused."""
        if not prompt.strip():
            return RenderError("the prompt is empty")
        name = type(self.pipeline).__name__
        if has_image and self._image_input == "none":
            return RenderError(f"the query has an image, and {name} makes videos from text alone")
        if not has_image and self._image_input == "required":
            return RenderError(f"the query has no image, and {name} makes videos from images")
        cut = self.cut(prompt)
        if not cut:
            return None
        assert self._text_tokens is not None
        excess = f"{self._text_tokens + cut} tokens, the text encoder takes {self._text_tokens}"
        if self.settings.long_prompts == "error":
            return RenderError(f"the prompt has {excess} (render.long_prompts)")
        self.truncated += 1
        log.warning("a prompt of %s, is cut; %d so far", excess, self.truncated)
        return None

    def cut(self, prompt: str) -> int | None:
        """How many tokens of a prompt the text encoder does not take, special ones included; None where the
        pipeline does not say."""
        if self._text_tokens is None:
            return None
        return max(0, len(self.pipeline.tokenizer(prompt, verbose=False).input_ids) - self._text_tokens)

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

    def _render_batch(
        self, prompts: list[str], seeds: list[int], image: Image | None
    ) -> list[np.ndarray | Exception]:
        arguments, limit = dict(self._call), self.settings.time_limit_s * len(prompts)
        if self._warming:
            arguments["num_inference_steps"] = min(2, self.settings.steps)
        if image is not None:
            arguments["image"] = cover(image, self.settings.width, self.settings.height)
        order = Order(prompts, seeds, arguments, None if self._warming else limit)
        with self._ranks.following(order) if self._ranks is not None else nullcontext():
            videos = denoise(self.pipeline, order, "pt")
        return [self._frames(video) for video in videos]

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


def _blank(settings: Render) -> Image:
    from PIL import Image

    return Image.new("RGB", (settings.width, settings.height), "grey")


def denoise(pipeline: Any, order: Order, output: Literal["pt", "latent"]) -> Any:
    """One call of the pipeline: a video per prompt, or its latents."""
    import torch

    arguments = dict(order.arguments)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if order.limit_s is not None and "callback_on_step_end" in parameters:
        arguments["callback_on_step_end"] = _deadline(order.limit_s)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in order.seeds]
    # LTX's image-to-video decodes with one generator only.
    generator = generators[0] if "image" in arguments else generators
    try:
        return pipeline(prompt=order.prompts, generator=generator, output_type=output, **arguments).frames
    except Exception:
        pipeline.maybe_free_model_hooks()  # caches and offloading start afresh
        raise


def _follower(settings: Render) -> Denoise:
    """What another rank does with orders; only rank 0 decodes."""
    pipeline = load_pipeline(settings)
    return lambda order: denoise(pipeline, order, "latent")


def _deadline(seconds: float) -> Callable[..., dict[str, Any]]:
    """A step callback that ends the pipeline call once the time is over, on all ranks at one step."""
    import torch.distributed as dist

    start = time.monotonic()
    shared = dist.is_available() and dist.is_initialized()

    def check(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        over = time.monotonic() - start > seconds
        if decided(over) if shared else over:
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
    return RenderError(advice + reason(error))


def encode(frames: np.ndarray, fps: float, crf: int) -> bytes:
    """H.264 in an mp4, yuv420p; the same frames give the same bytes.

    Args:
        frames: uint8 of shape (T, H, W, 3). yuv420p needs even sides: an odd one is grown by one by
            repeating the last row or column.
        fps: frames a second.
        crf: x264's constant rate factor, 0 (no loss after the conversion to yuv420p, which halves
            the resolution of colour) to 51 (worst). Few browsers play crf 0.

    Raises:
        ValueError: the frames have another shape or type, or a size that x264 does not take.
    """
    import av

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames are uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            # Else x264's fastest code reads memory that it never wrote, and its choices follow from that.
            stream.options = {"crf": str(crf), "preset": "medium", "x264-params": "cpu-independent=1"}
            stream.thread_count = 1  # x264 divides its work, and so its choices, by the number of threads
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        raise ValueError(f"x264 takes no frames of {frames.shape[2]} x {frames.shape[1]}: {error}") from error
    return buffer.getvalue()


def probe_video(data: bytes) -> VideoInfo:
    """Decode every frame of an mp4, or of another file that FFmpeg reads. Raises ValueError for what is no
    whole video."""
    import av

    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError("no video stream in these bytes")
            stream = container.streams.video[0]
            frames = cut = 0
            for packet in container.demux(stream):
                frames += len(packet.decode())
                cut += bool(packet.size) and packet.is_discard  # from before a cut that encoded nothing anew
            # Fragmented mp4 and WebM do not tell how many there are.
            if frames == 0 or stream.frames not in (0, frames + cut):
                raise ValueError(f"{frames} frames can be decoded of {stream.frames - cut}")
            rate = float(stream.average_rate or stream.base_rate or 0)
            if rate <= 0:
                raise ValueError("the video has no frame rate")
            return VideoInfo(frames, rate, stream.width, stream.height)
    except av.FFmpegError as error:
        raise ValueError(f"not a video: {error}") from error
