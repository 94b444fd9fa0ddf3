"""A policy that is a LoRA adapter (arXiv 2106.09685), as peft saves it: its files name the base model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import Any

from vpo_ray.files.folder import Folder, join, parent_of
from vpo_ray.recipe import locate
from vpo_ray.storage.model_cache import fetch_for_engine

_SETTINGS = "adapter_config.json"
# The maximum ranks that vLLM supports.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_UNFIT = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")


class AdapterError(ValueError):
    """A folder with an adapter that cannot be loaded."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as peft saves it: its folder or URI, its base model, and its rank."""

    folder: str
    base: str
    rank: int
    unfit: str | None = None  # why vLLM cannot do what it says

    def engine_kwargs(self) -> dict[str, Any]:
        """What makes room for it in vLLM.

        Raises:
            AdapterError: vLLM refuses such an adapter, or computes something else.
        """
        if self.unfit is not None:
            raise AdapterError(
                f"{self.folder}: vLLM takes no adapter with {self.unfit}: merge it into its base model "
                "(merge_and_unload of peft), and name the whole model"
            )
        room = next((rank for rank in _RANKS if rank >= self.rank), _RANKS[-1])
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}

    def on_node(self) -> Adapter:
        """The adapter with local paths: URIs are fetched to this node."""
        return replace(self, folder=fetch_for_engine(self.folder), base=fetch_for_engine(self.base))


def adapter_of(model: str) -> Adapter | None:
    """The adapter in a local folder or at a URI, or None for a whole model.

    Raises:
        AdapterError: its `adapter_config.json` cannot be used.
        StorageError: the URI cannot be opened.
    """
    if "://" not in model and not os.path.isdir(model):
        return None
    place = Folder(model)
    if not place.exists(_SETTINGS):
        return None
    path = place.at(_SETTINGS)
    try:
        config = json.loads(place.read(_SETTINGS))
        kind, named = config.get("peft_type", "LORA"), config.get("base_model_name_or_path")
        if kind != "LORA":
            raise ValueError(f"peft_type is {kind}")
        if not isinstance(named, str) or not named:
            raise ValueError(f"base_model_name_or_path is {named!r}: write the base model's folder or hub id")
        base, rank = _base_of(place, named), int(config.get("r"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path}: not the settings of a LoRA adapter: {error}") from error
    return Adapter(place.uri, base, rank, _unfit(config, rank))


def _unfit(config: dict[str, Any], rank: int) -> str | None:
    """What of an adapter vLLM refuses, or passes over: it scales all layers by the one rank and alpha."""
    if rank > _RANKS[-1]:
        return f"the rank {rank}, at most {_RANKS[-1]}"
    named = next((key for key in _UNFIT if config.get(key)), None)
    if named is None and config.get("bias", "none") != "none":
        named = "bias"
    return named and f"{named} {json.dumps(config[named])}"


def _base_of(place: Folder, named: str) -> str:
    """The base model of an adapter. Where its folder is gone and one of its name lies beside the adapter, as
    in a run directory that was moved, it is that."""
    base = locate(named)
    if "://" not in base and not (os.path.isabs(base) and not os.path.exists(base)):
        return base
    if "://" in base and Folder(base).exists("config.json"):
        return base
    beside = join(parent_of(place.uri), base.partition("?")[0].rstrip("/").rpartition("/")[2])
    return beside if Folder(beside).exists("config.json") else base
