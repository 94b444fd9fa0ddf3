"""Vision-language models: their language model is trained, and what they see with is set apart, frozen.

The vision tower and its connector are no part of what DeepSpeed and peft look at: every worker has them
whole, whatever the ZeRO stage, so that it computes the features of the images that it needs, when it needs
them. An export gets them back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vpo_ray.prompts.image_places import TRAINED_PLACES
from vpo_ray.train.examples import TrainError
from vpo_ray.train.images import JobImages

_APART = "vpo_apart"  # on the module whose parts are set apart: their names

# Bytes of features that a worker keeps, in its node's memory: 2 GiB.
KEPT_BYTES = 2**31


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model as it is trained here."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if config.model_type in TRAINED_PLACES else AutoModelForCausalLM


def attention_of(config: Any, name: str) -> str | dict[str, str]:
    """Which attention of transformers a model is loaded with: `name` for its language model."""
    return {"text_config": name} if config.model_type in TRAINED_PLACES else name


def freeze_vision(model: Any) -> None:
    """Take all but the language model and the head of a vision-language model from its registered parts. They
    are its attributes still, so that its own methods find them. Does nothing to other models.

    Under ZeRO-3 every rank must call this: partitioned parameters become whole.

    Raises:
        TrainError: the language model is no direct part.
    """
    if model.config.model_type not in TRAINED_PLACES:
        return
    core, decoder = model.base_model, model.get_decoder()
    if not any(child is decoder for child in core.children()):
        raise TrainError(f"{type(model).__name__}: its language model is not where it is looked for")
    _make_whole(core, decoder)
    names = [name for name, part in core.named_children() if part is not decoder]
    moved = {name: core._modules.pop(name).eval().requires_grad_(False) for name in names}
    moved |= {name: core._parameters.pop(name).requires_grad_(False) for name in list(core._parameters)}
    core.__dict__ |= {**moved, _APART: tuple(moved)}


def _make_whole(core: Any, decoder: Any) -> None:
    trained = set(decoder.modules())
    for module in core.modules():
        for name, parameter in module._parameters.items():
            if module not in trained and hasattr(parameter, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    module._parameters[name] = nn.Parameter(parameter.data.clone(), requires_grad=False)


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        yield from ((f"{path}.{name}", module.__dict__[name]) for name in module.__dict__.get(_APART, ()))


def apart_pattern(model: Any) -> str | None:
    """A regular expression of the names of what is set apart; None where nothing is."""
    names = [name.rpartition(".")[2] for name, _ in _parts(model)]
    return rf".*\.({'|'.join(names)})\..*" if names else None


def frozen_weights(model: Any) -> dict[str, Tensor]:
    """The weights that are set apart, by the names that they have in the model."""
    found: dict[str, Tensor] = {}
    for path, part in _parts(model):
        if isinstance(part, nn.Module):
            found |= {f"{path}.{name}": tensor for name, tensor in part.state_dict().items()}
        else:
            found[path] = part.detach()
    return found


class ImageFeatures:
    """The features of images under a model whose vision tower is set apart.

    Each image is computed by itself, so that its features do not depend on the others of a pack, and those
    used last are kept.
    """

    def __init__(self, images: JobImages, model: Any, device: torch.device) -> None:
        self.images, self.model, self.device = images, model, device
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._bytes = 0
        for _, part in _parts(model):
            if isinstance(part, nn.Module):
                part.to(device)
            else:
                part.data = part.data.to(device)

    def embedded(self, ids: Tensor) -> Tensor:
        """What the language model takes for the tokens of a pack: [1, T] to [1, T, width]."""
        embedded: Tensor = self.model.get_input_embeddings()(ids.clamp(min=0))
        shown = ids < 0
        numbers = -1 - ids[shown].cpu().numpy()
        if not len(numbers):
            return embedded
        starts = self.images.starts
        found, at = np.unique(np.searchsorted(starts, numbers, side="right") - 1, return_inverse=True)
        features = torch.cat([self.of(int(image)) for image in found])
        begins = np.cumsum([0, *np.diff(starts)[found]])[:-1]
        rows = torch.from_numpy(begins[at] + numbers - starts[found][at]).to(ids.device)
        return embedded.masked_scatter(shown[..., None], features[rows].to(embedded.dtype))

    def whole(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model's own forward takes, for tokens [1, T] with one image at most."""
        shown = ids < 0
        if not shown.any():
            return {"input_ids": ids}
        image = int(np.searchsorted(self.images.starts, -1 - int(ids[shown][0]), side="right")) - 1
        return {"input_ids": ids.masked_fill(shown, self.images.token), **self._inputs(image)}

    def _inputs(self, image: int) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.images.inputs(image).items()}

    @torch.no_grad()
    def of(self, image: int) -> Tensor:
        """The features [n, width] of an image, on the device."""
        if image in self._kept:
            self._kept.move_to_end(image)
            return self._kept[image].to(self.device)
        made = self.model.get_image_features(**self._inputs(image), return_dict=True).pooler_output
        parts = [made] if isinstance(made, Tensor) else list(made)
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        wanted = int(self.images.starts[image + 1] - self.images.starts[image])
        if len(features) != wanted:
            raise TrainError(
                f"the model makes {len(features)} features of the image {self.images.names[image]}, and its "
                f"processor has {wanted} tokens for them: model and processor do not belong together"
            )
        self._kept[image] = features.cpu()
        self._bytes += features.nbytes
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return features
