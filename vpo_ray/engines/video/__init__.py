"""Video models: a prompt becomes a video.

Every video model has one interface, `VideoModel`, and is chosen by `render.kind` of the recipe: one of
`KINDS`, which are modules with a `prepare(settings, account)`, or another's (see `recipe.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from vpo_ray.engines.endpoint.account import Account
from vpo_ray.files.image_files import decode_image
from vpo_ray.recipe import Render, plugins

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# Recipe name -> module; imported when asked for, because they bring torch.
KINDS = {
    "diffusers": "vpo_ray.engines.video.engine",
    "openai": "vpo_ray.engines.video.openai_video",
}


class RenderError(RuntimeError):
    """One prompt could not be rendered; the message is the reason that its row carries."""


class DeviceLostError(RuntimeError):
    """The accelerator is in a state that only a new process clears (an illegal access, an ECC error)."""


class VideoModel(Protocol):
    """Renders prompts. A class that inherits from this has to define `render` only."""

    def render(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Sequence[np.ndarray | bytes | Exception]:
        """One result for every prompt, in order.

        Returns:
            Frames, uint8 of shape (frames, height, width, 3), which are encoded with `render.fps` and
            `render.crf`; or the bytes of a whole mp4, which are kept as they are; or the exception that
            says why there is no video.

        Raises:
            DeviceLostError: the process must end.
        """
        ...

    def animate(
        self, images: Sequence[Image], prompts: Sequence[str], seeds: Sequence[int]
    ) -> Sequence[np.ndarray | bytes | Exception]:
        """As `render`, for queries with an image each, RGB and of any size. A model that makes videos from
        images defines it."""
        return [RenderError("this video model takes no image, and the query has one")] * len(prompts)

    def animate_files(
        self, files: Sequence[tuple[str, bytes]], prompts: Sequence[str], seeds: Sequence[int]
    ) -> Sequence[np.ndarray | bytes | Exception]:
        """As `animate`, with each image's name, `<sha256>.<kind>`, and its bytes. A model that passes them on
        defines it in place of `animate`."""
        return self.animate([decode_image(data) for _, data in files], prompts, seeds)

    def warm_up(self) -> None:
        """Called once before the first render; its time is in no row's seconds."""
        return None

    def cut(self, prompt: str) -> int | None:
        """How many tokens of a prompt the model does not take; None where it does not say."""
        return None

    def stored(self, prompt: str, seed: int, image: str | None = None) -> None:
        """Called when a video that it rendered is in the store; `image` is the name of its query's."""
        return None


@dataclass(frozen=True)
class Prepared:
    """A video model that is not loaded yet: videos in the store need none.

    Args:
        identity: all that changes its videos beside the settings; part of every video's key.
        load: makes the model.
        concurrent: any number of threads may call its `render` at once, and it keeps its own time limit.
    """

    identity: str
    load: Callable[[], VideoModel]
    concurrent: bool = False


def prepare(settings: Render, account: Account | None = None) -> Prepared:
    """The video model of a recipe.

    Args:
        account: what the videos of a service are paid into.

    Raises:
        ValueError: the model cannot be used.
        StorageError: the model is a URI that cannot be read.
    """
    if settings.is_plugin:
        plugin = plugins.find(settings)
        return Prepared(plugin.identity(settings), partial(plugin.build, settings))
    prepared: Prepared = import_module(KINDS[settings.kind]).prepare(settings, account)
    return prepared
