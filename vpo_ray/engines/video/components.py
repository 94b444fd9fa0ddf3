"""The components of a diffusers pipeline: which of their files are loaded, and that these have all weights.

A weight that is in no file leaves noise in its place, or nothing, and the loaders only log it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vpo_ray.engines.video.weights import VideoModelError

_WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")


def only_variant(model: str) -> str | None:
    """The variant (`fp16`) of a folder's components that have weights under its name alone; None where all
    have plain ones, too, and for what is no folder."""
    found = set()
    for folder in filter(Path.is_dir, Path(model).glob("*/")):
        names = [_WEIGHTS.fullmatch(path.name) for path in folder.iterdir()]
        variants = {name["variant"] for name in names if name is not None}
        found |= set() if None in variants else variants
    return min(found, default=None)


def language_models(
    model: str, revision: str | None, index: Mapping[str, Any], dtype: Any, variant: str | None = None
) -> dict[str, Any]:
    """Those of transformers (encoders of text and images), loaded as diffusers would load them, by name.

    Args:
        index: of the pipeline: from a component's name to its library and class.
        dtype: as `DiffusionPipeline.from_pretrained` takes it.

    Raises:
        VideoModelError: weights that a component needs are in none of its files.
    """
    import transformers

    found = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "transformers":
            continue
        kind: Any = getattr(transformers, str(entry[1]), None)
        if transformers.PreTrainedModel not in getattr(kind, "__mro__", ()):
            continue
        given = {"dtype": dtype.get(name, dtype["default"]) if isinstance(dtype, Mapping) else dtype}
        if variant is not None and any(Path(model, name).glob(f"*.{variant}[.-]*safetensors")):
            given["variant"] = variant
        where = {"subfolder": name, "revision": revision or "main"}
        found[name], info = kind.from_pretrained(model, **where, **given, output_loading_info=True)
        # A head that writes text is not asked by pipelines.
        refuse_missing(model, name, (key for key in info["missing_keys"] if not key.startswith("lm_head.")))
    return found


def refuse_missing(model: str, component: str, keys: Iterable[str]) -> None:
    """Raises VideoModelError where there are names of weights that no file of a component has."""
    if missing := sorted(keys):
        raise VideoModelError(
            f"render.model {model!r}: the weights of its {component} are not those of its config.json: "
            f"{len(missing)} are missing, such as {missing[0]}; download it again, or see how it was saved"
        )


def refuse_unloaded(model: str, components: Mapping[str, Any]) -> None:
    """Raises VideoModelError for a component of diffusers with weights that were in none of its files."""
    for name, component in components.items():
        if hasattr(component, "named_parameters"):
            refuse_missing(model, name, (key for key, value in component.named_parameters() if value.is_meta))
