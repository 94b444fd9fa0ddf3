"""The weights of a video model: which they are, the LoRA that is added, the precision they are kept in.

Between loading and the first render. Two recipes whose weights have the same identity make the same
videos, so the identity is part of every video's key.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from vpo_ray.files.input_files import walk
from vpo_ray.recipe import Lora, Render
from vpo_ray.records import content_id
from vpo_ray.storage.model_cache import fetch

log = logging.getLogger(__name__)

# The file that diffusers' `save_lora_weights` writes.
_LORA_FILE = "pytorch_lora_weights.safetensors"
# Files of a model's folder that decide what it renders.
_MODEL_FILES = frozenset({".json", ".safetensors", ".bin", ".pt", ".txt", ".model", ".py"})
_SAMPLE = 4096  # bytes read at each of
_SAMPLES = 64  # places in a large file
# torchao's configuration of each name that `render.quantize` takes.
_QUANTISATIONS = {
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "float8_weight_only": "Float8WeightOnlyConfig",
    "float8_dynamic": "Float8DynamicActivationFloat8WeightConfig",
}


class VideoModelError(ValueError):
    """A model or a setting that cannot render at all: the run should stop, not the row."""

    stops_run = True  # see stream/stops.py


def on_node(settings: Render) -> Render:
    """The settings with the model and the LoRA where this node reads them: URIs are fetched.

    Raises:
        StorageError: there is nothing at a URI, or it cannot be read.
    """
    lora = settings.lora and settings.lora.model_copy(update={"path": fetch(settings.lora.path)})
    return settings.model_copy(update={"model": fetch(settings.model), "lora": lora})


def weights_identity(settings: Render) -> str:
    """The model's identity, and the LoRA's where there is one.

    Raises:
        VideoModelError: the model or the LoRA is not there.
    """
    model = model_identity(settings.model, settings.revision)
    if settings.lora is None:
        return model
    with lora_file(settings.lora).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{model}+lora:{digest[:32]}*{settings.lora.scale:g}"


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
        found = (path for path in walk(folder, every_name=True) if path.suffix in _MODEL_FILES)
        files = sorted(path for path in found if not path.name.startswith("."))
        return "folder:" + content_id([[str(f.relative_to(folder)), *sampled(f)] for f in files])
    from huggingface_hub import hf_hub_download

    try:
        index = hf_hub_download(model, "model_index.json", revision=revision)
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are of these two kinds
        raise VideoModelError(f"render.model {model!r} is no folder here, nor on the hub: {error}") from error
    return f"{model}@{Path(index).parent.name}"


def sampled(path: Path) -> tuple[int, str]:
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


def lora_file(lora: Lora) -> Path:
    """The safetensors file that a recipe's LoRA means: a file, one in a folder, or one of a hub id.

    Raises:
        VideoModelError: there is none, or a folder holds several and none is named.
    """
    path = Path(lora.path)
    if path.is_dir():
        found = [path / lora.weight_name] if lora.weight_name else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise VideoModelError(
                f"render.lora: {lora.path} holds {len(found)} safetensors files; "
                "name one with render.lora.weight_name"
            )
        path = found[0]
    if path.is_file():
        if path.suffix != ".safetensors":
            raise VideoModelError(f"render.lora: {path} is no safetensors file, the only kind that is read")
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(lora.path, lora.weight_name or _LORA_FILE, revision=lora.revision))
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are of these two kinds
        raise VideoModelError(f"render.lora: {path} is no file here, nor on the hub: {error}") from error


def add_lora(pipeline: Any, lora: Lora) -> None:
    """Add a LoRA to the weights themselves, so that rendering with it costs nothing more.

    Raises:
        VideoModelError: the pipeline takes none, or parts of this one fit no module of it.
    """
    from safetensors import SafetensorError

    name, file = type(pipeline).__name__, lora_file(lora)
    if not hasattr(pipeline, "load_lora_weights"):
        raise VideoModelError(f"render.lora: {name} takes no LoRA weights")
    try:
        where = {"weight_name": file.name, "use_safetensors": True}
        keys = pipeline.lora_state_dict(str(file.parent), **where)
        keys = keys[0] if isinstance(keys, tuple) else keys
        # diffusers passes over the weights of modules that are not there.
        strange = sorted(module for module in _lora_modules(keys) if not _has_module(pipeline, module))
        if strange or not keys:
            raise VideoModelError(
                f"render.lora: {file} is for another model: {name} has no {', '.join(strange[:3])}"
                + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
            )
        pipeline.load_lora_weights(str(file.parent), **where)
        components = [part for part in pipeline._lora_loadable_modules if _adapted(pipeline, part)]
        pipeline.fuse_lora(components, lora_scale=lora.scale, safe_fusing=True)
        pipeline.unload_lora_weights()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, VideoModelError):
            raise
        raise VideoModelError(f"render.lora: {file} cannot be added to {name}: {error}") from error


def _lora_modules(keys: Any) -> set[str]:
    """The modules that a LoRA's weights are for: `transformer.blocks.0.attn.to_q`."""
    return {key.partition(".lora")[0] for key in keys if ".lora" in key} or set(keys)


def _has_module(pipeline: Any, path: str) -> bool:
    component, _, rest = path.partition(".")
    model = getattr(pipeline, component, None)
    if model is None or not hasattr(model, "get_submodule"):
        return False
    try:
        model.get_submodule(rest)
    except AttributeError:
        return False
    return True


def _adapted(pipeline: Any, component: str) -> bool:
    return bool(getattr(getattr(pipeline, component, None), "peft_config", None))


def quantise(model: Any, name: str, device: str) -> None:
    """Keep the weights of a network's linear layers in 8 bits, by torchao.

    It comes after a LoRA is added, which 8 bits could not take in. `*_weight_only` saves memory and
    computes in the network's precision; `*_dynamic` rounds activations too and computes in 8 bits,
    which is faster where it is compiled. Modules that diffusers keeps in float32 are left alone.

    Raises:
        VideoModelError: torchao is not installed, or the device or the network cannot.
    """
    where = f"render.quantize={name}: {type(model).__name__}"
    try:
        import torchao.quantization as torchao
        from torchao.utils import TorchAOBaseTensor
    except ImportError as error:
        raise VideoModelError(f"render.quantize={name} needs torchao: {error}") from error
    from torch import nn

    precise = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())

    def takes(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and not any(part in path.split(".") for part in precise)

    try:
        torchao.quantize_(model, getattr(torchao, _QUANTISATIONS[name])(), takes, device=device)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        raise VideoModelError(f"{where} cannot be quantised on {device}: {error}") from error
    # torchao passes over layers whose shape it cannot take.
    linear = [module for path, module in model.named_modules() if takes(module, path)]
    done = sum(isinstance(module.weight, TorchAOBaseTensor) for module in linear)
    if not done:
        raise VideoModelError(f"{where} has no linear layer that it can quantise")
    log.info("%s: %d of %d linear layers in 8 bits (%s)", type(model).__name__, done, len(linear), name)
