"""The export, rehearsed before the first step: everything but the weights.

A model whose configuration, tokenizer or adapters could not be written at the end, or not be read back, is
refused before any training is paid for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vpo_ray.engines.chat.tokenizer import load_chat_tokenizer
from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.prompts.image_places import TRAINED_PLACES
from vpo_ray.prompts.policy_prompt import chat_ids
from vpo_ray.storage.model_cache import fetch
from vpo_ray.train.examples import TrainError
from vpo_ray.train.images import image_tokens, load_processor
from vpo_ray.train.lora import attach, merge
from vpo_ray.train.model_files import discard_leftovers
from vpo_ray.train.phase import Job
from vpo_ray.train.portable import for_older_readers
from vpo_ray.train.save_pretrained import generation_config, write_generation, write_policy

# Must be tokenised the same before and after: case, spaces, accents, other scripts, digits.
PROBE = "A cat  naps,\nun café — 一只猫 🐈 don't (12.5%)"

OWN_CODE = "brings its own code: write trust_remote_code: true beside its name if you trust it"


def rehearse(job: Job) -> None:
    """Write what an export holds beside its weights, and read it back.

    Raises:
        TrainError: something cannot be written, or reads back differently.
    """
    model, lora = job.model, job.settings.lora
    with _explained(model):
        skeleton = _skeleton(model, job.revision, job.trust_remote_code)
        _refuse_quantised(skeleton, model, lora is not None and not lora.merge)
        if lora is not None:
            skeleton = attach(skeleton, lora)
        with tempfile.TemporaryDirectory(prefix="vpo-rehearsal-") as name:
            folder = Path(name, "policy")
            generation = write_policy(
                skeleton, {}, job, folder, merged=lambda _: merge(skeleton, check=False)
            )
            whole = lora is None or lora.merge
            _read_back(folder, job, generation, skeleton.config if whole else None)
            if whole and skeleton.config.model_type in TRAINED_PLACES:
                _read_processor_back(folder, job, TRAINED_PLACES[skeleton.config.model_type])


def rehearse_texts(
    model: str,
    tokenizer: Any,
    end: list[int],
    keeps_base: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """The part of `rehearse` that needs no torch: write and read back tokenizer and generation config.

    Args:
        keeps_base: only adapters are exported, so the base model may be quantised.

    Raises:
        TrainError: see `rehearse`.
    """
    with _explained(model):
        local = fetch(model, weights=False)
        config = _config_of(model, local, revision, trust_remote_code)
        own = _generation_of(model, local, revision)
        like: Any = SimpleNamespace(config=config, **({} if own is None else {"generation_config": own}))
        _refuse_quantised(like, model, keeps_base)
        job = SimpleNamespace(model=model, trust_remote_code=trust_remote_code, tokenizer=tokenizer, end=end)
        with tempfile.TemporaryDirectory(prefix="vpo-rehearsal-") as name:
            generation = generation_config(like, end)
            write_generation(generation, Path(name))
            tokenizer.save_pretrained(name)
            for_older_readers(Path(name))
            _read_back(Path(name), job, generation, None)


@contextmanager
def _explained(model: str) -> Iterator[None]:
    try:
        yield
    except TrainError:
        raise
    except OSError as error:
        raise TrainError(f"{model}: cannot be read, or {tempfile.gettempdir()} written: {error}") from error
    except Exception as error:
        raise TrainError(
            f"{model} cannot be exported after training: {type(error).__name__}: {error}. Repair the "
            "model's folder, or train another model"
        ) from error


def _skeleton(model: str, revision: str | None, trust: bool) -> Any:
    """The model without weights, with the generation config that it loads with."""
    import torch

    from vpo_ray.train.vision import auto_class, freeze_vision

    local = fetch(model, weights=False)
    config = _config_of(model, local, revision, trust)
    try:
        with torch.device("meta"):
            made = auto_class(config).from_config(config, trust_remote_code=trust)
    except ValueError as error:
        raise TrainError(f"{model} is not a causal language model: {error}") from error
    freeze_vision(made)
    own = _generation_of(model, local, revision)
    if own is not None:
        made.generation_config = own
    return made


def _config_of(model: str, local: str, revision: str | None, trust: bool) -> Any:
    """The configuration of a model that can be trained.

    Raises:
        TrainError: it does not load, or is that of another kind of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    )

    try:
        config = AutoConfig.from_pretrained(local, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise TrainError(f"{model} {OWN_CODE}") from error
        why = " ".join(str(error).split())[:200]
        raise TrainError(f"{model}: its config.json does not load: {why}") from error
    heads = set(getattr(config, "architectures", None) or ())
    others = (
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
    )
    taken = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *TRAINED_PLACES}
    writes = config.model_type in taken or getattr(config, "auto_map", None)
    if not writes or getattr(config, "is_encoder_decoder", False) or heads.intersection(others):
        raise TrainError(
            f"{model} is not a causal language model but a {' '.join([config.model_type, *sorted(heads)])}: "
            "name one that continues a text, such as a Llama or a Qwen that follows instructions"
        )
    return config


def _generation_of(model: str, local: str, revision: str | None) -> Any:
    """The model's own generation config; None where it has none, and config.json decides."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(local, revision=revision or "main")
    except ValueError as error:
        raise TrainError(f"{model}: its generation_config.json does not load: {error}") from error
    except OSError as error:
        if Path(local, "generation_config.json").is_file():
            raise TrainError(f"{model}: its generation_config.json does not load: {error}") from error
        return None


def _refuse_quantised(skeleton: Any, model: str, keeps_base: bool) -> None:
    given: Any = getattr(skeleton.config, "quantization_config", None)
    given = given.to_dict() if hasattr(given, "to_dict") else given
    if given and not given.get("dequantize") and not keeps_base:
        raise TrainError(
            f"{model} is quantised ({given.get('quant_method', 'by its config.json')}): its weights cannot "
            "be trained, nor adapters be merged into them. Name the model that it was made from"
        )


def _read_back(folder: Path, job: Any, generation: Any, config: Any) -> None:
    from transformers import AutoConfig, GenerationConfig

    trust = job.trust_remote_code
    if config is not None:
        own = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        if _rope(own) != _rope(config):
            raise TrainError(f"{job.model}: its config.json reads back differently: {_rope(own)}")
    read = GenerationConfig.from_pretrained(folder)
    if _meaning(read) != _meaning(generation):
        raise TrainError(f"{job.model}: its generation config reads back differently")
    tokenizer = load_chat_tokenizer(str(folder), trust_remote_code=trust)
    said = [{"role": "user", "content": PROBE}]
    for name, before, after in (
        ("the chat template", job.tokenizer.chat_template, tokenizer.chat_template),
        ("a prompt", chat_ids(job.tokenizer, said), chat_ids(tokenizer, said)),
        *((f"{text!r}", _ids(job.tokenizer, text), _ids(tokenizer, text)) for text in (PROBE, f" {PROBE}")),
    ):
        if before != after:
            raise TrainError(
                f"{job.model}: its tokenizer is not the same after it is saved and loaded: {name} differs. "
                "Load and save it once with transformers, and see what its folder lacks"
            )


def _read_processor_back(folder: Path, job: Job, place: str) -> None:
    how = job.revision, job.trust_remote_code
    processors = load_processor(fetch(job.model, weights=False), *how), load_processor(str(folder), *how)
    before, after = (image_tokens(processor, place, (640, 480), {}).tolist() for processor in processors)
    if before != after:
        raise TrainError(f"{job.model}: the processor of its images is not the same after it is saved")


def _rope(config: Any) -> Any:
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    # `type` is an older name of `rope_type`, which stays where a file has it.
    return {key: value for key, value in rope.items() if key != "type"} if isinstance(rope, dict) else rope


def _meaning(generation: Any) -> dict[str, Any]:
    set_keys: dict[str, Any] = generation.to_diff_dict()
    return {k: v for k, v in set_keys.items() if k not in ("transformers_version", "compile_config")}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def check_room(out: str, size: int) -> None:
    """Check that an export of `size` bytes fits at `out` and can be written there, with an empty file.

    Raises:
        TrainError: `out` is a file or cannot be written, or there is too little room.
    """
    place = Folder(out)
    if place.is_local and os.path.lexists(place.path) and not os.path.isdir(place.path):
        raise TrainError(f"{out} is where the trained policy goes, but it is not a folder: move it away")
    discard_leftovers(out)
    parent = Folder(str(Path(place.path).resolve().parent)) if place.is_local else place
    name = f".vpo-{uuid.uuid4().hex}"
    try:
        parent.write(name, b"")
        parent.fs.delete_file(f"{parent.path}/{name}")
    except (OSError, StorageError) as error:
        raise TrainError(f"{out}, where the trained policy goes, cannot be written: {error}") from error
    needs: dict[int, tuple[str, int]] = {}
    for folder in (tempfile.gettempdir(), *([parent.path] if place.is_local else [])):
        device = os.stat(folder).st_dev
        needs[device] = (folder, needs.get(device, ("", 0))[1] + size)
    for folder, wanted in needs.values():
        free = shutil.disk_usage(folder).free
        if free < wanted:
            raise TrainError(
                f"{folder} has {free / 1e9:.1f} GB left on this node, and the export will take "
                f"{wanted / 1e9:.1f} GB there: make room, or set TMPDIR or `out`"
            )
