"""The images of a policy's prompts, as numbers: what the driver hands to the workers.

The checkpoint's own processor says which tokens stand for an image, and what its vision tower takes. Some of
these tokens stand for features, the vectors that the tower makes of an image. Every feature of a job has a
number, and the token of feature n is -1 - n. So prompts with other images are other tokens, and what examples
share in a pack follows from tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vpo_ray.files.image_files import ImageError, decode_image
from vpo_ray.prompts.image_places import TRAINED_PLACES, image_lines, why_untrained
from vpo_ray.prompts.policy_prompt import prompt_ids
from vpo_ray.storage.images import ImageStore
from vpo_ray.train.examples import TrainError

if TYPE_CHECKING:
    from torch import Tensor

_READERS = 8  # images read at once; an object store takes tens of ms for each
# What a processor returns of the text.
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class JobImages:
    """The images of a job's prompts. Picklable.

    names: in the store at `uri`. starts: int64 [images + 1]; image i has the features starts[i] to
    starts[i + 1] - 1. processor: the checkpoint's, and `arguments` of its calls. place: what stands for an
    image in a text, `token` its id, which is also that of a feature.
    """

    uri: str
    names: tuple[str, ...]
    starts: np.ndarray
    processor: Any
    arguments: Mapping[str, Any]
    place: str
    token: int

    def inputs(self, image: int) -> dict[str, Tensor]:
        """What the model takes of an image beside its tokens. Raises StorageError."""
        picture = decode_image(ImageStore(self.uri).read(self.names[image]))
        return _processed(self.processor, self.place, picture, self.arguments)[1]


class ImagePrompts:
    """Makes prompts with images.

    Args:
        model: a local folder or hub id.
        tokenizer: the policy's, with its task prompt.
        uri: of the store of images.
        names: of all images of the job.
        arguments: of the processor, as vLLM's `mm_processor_kwargs`.

    Raises:
        TrainError: a model that is not trained with images, or one whose processor or tokenizer lacks what it
            takes.
        StorageError: an image is not there, or damaged.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        uri: str,
        names: Sequence[str],
        revision: str | None = None,
        trust_remote_code: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        if why := why_untrained(model, config.model_type):
            raise TrainError(why)
        processor = load_processor(model, revision, trust_remote_code)
        place = TRAINED_PLACES[config.model_type]
        token = tokenizer.convert_tokens_to_ids(place)
        if token != config.image_token_id:
            raise TrainError(f"{model}: its tokenizer does not know {place}, which stands for an image")
        self._tokenizer = tokenizer
        ordered = sorted(set(names))
        sizes = _sizes(uri, ordered)
        # Which tokens stand for an image follows from its size.
        given = dict(arguments or {})
        blank = {size: image_tokens(processor, place, size, given) for size in sorted(set(sizes))}
        counts = [int((blank[size] == token).sum()) for size in sizes]
        starts = np.cumsum([0, *counts], dtype=np.int64)
        self.images = JobImages(uri, tuple(ordered), starts, processor, given, place, token)
        self._tokens: Mapping[str, np.ndarray] = {
            name: _numbered(blank[size], token, start)
            for name, size, start in zip(ordered, sizes, starts[:-1].tolist(), strict=True)
        }

    def prompt(self, query: str, image: str) -> list[int]:
        """Tokens of the prompt for a query with an image, where those of features are below 0.

        Raises:
            PromptError: see `prompt_ids`.
            TrainError: the chat template shows the image not once.
        """
        ids = prompt_ids(self._tokenizer, query, image_lines(self.images.place))
        if ids.count(self.images.token) != 1:
            raise TrainError("the chat template changes or leaves out what stands for an image")
        at = ids.index(self.images.token)
        return [*ids[:at], *self._tokens[image].tolist(), *ids[at + 1 :]]


def _sizes(uri: str, names: Sequence[str]) -> list[tuple[int, int]]:
    store = ImageStore(uri)

    def size(name: str) -> tuple[int, int]:
        try:
            return decode_image(store.read(name)).size
        except ImageError as error:
            raise TrainError(f"{store.folder.at(name)}: {error}") from error

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(size, names))


def load_processor(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The processor of a model in a local folder or on the hub. Raises TrainError."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise TrainError(f"{model}: the processor of its images does not load: {error}") from error


def image_tokens(
    processor: Any, place: str, size: tuple[int, int], arguments: Mapping[str, Any]
) -> np.ndarray:
    """The tokens that stand for an image of so many pixels, int64 [n]."""
    from PIL import Image

    return _processed(processor, place, Image.new("RGB", size), arguments)[0]


def _processed(
    processor: Any, place: str, picture: Any, arguments: Mapping[str, Any]
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """The tokens of an image, and what the model takes beside them."""
    given = {**arguments, "add_special_tokens": False, "return_tensors": "pt"}
    found = dict(processor(text=place, images=[picture], **given))
    return found["input_ids"][0].numpy(), {k: v for k, v in found.items() if k not in _OF_TEXT}


def _numbered(ids: np.ndarray, token: int, start: int) -> np.ndarray:
    """The tokens of an image, with numbers in place of its features."""
    feature = ids == token
    numbered = ids.copy()
    numbered[feature] = -1 - start - np.arange(feature.sum())
    return numbered
