"""Whether a model sees, by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys of a model's configuration that tell of eyes.
_EYES = ("vision_config", "img_processor", "visual", "vision_tower", "mm_vision_tower")


def has_eyes(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a model that sees."""
    return any(config.get(key) for key in _EYES)


def checkpoint_has_eyes(model: str) -> bool:
    """Whether a checkpoint sees: a folder, URI or hub id, of weights or of an adapter, whose base counts.

    Raises:
        AdapterError: the adapter's settings cannot be used.
        StorageError: the URI cannot be read.
        OSError: there is no configuration that can be read.
    """
    from transformers import PretrainedConfig

    from vpo_ray.engines.chat.adapter import adapter_of
    from vpo_ray.storage.model_cache import fetch

    adapter = adapter_of(model)
    config, _ = PretrainedConfig.get_config_dict(
        fetch(model if adapter is None else adapter.base, weights=False)
    )
    return has_eyes(config)
