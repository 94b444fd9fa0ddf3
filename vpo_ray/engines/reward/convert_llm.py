"""VideoScore and VideoReward, whose heads read a language model's hidden states; see `convert`."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpo_ray.engines.reward.conversion import (
    Conversion,
    ConvertError,
    RewardKind,
    check_names,
    copy_texts,
    read_all,
    shapes_in,
)
from vpo_ray.engines.reward.videoreward import MARKERS, TEMPLATE_HASH

_SCORE = {"score.weight", "score.bias"}
_PARTS = (
    "model.vision_model.", "model.connector.modality_projection.", "model.connector.perceiver_resampler.",
    "model.text_model.",
)  # fmt: skip
_MARKS = 5
_LORA = re.compile(r"(?P<name>.+)\.lora_(?P<side>[AB])\.(\w+\.)?weight")
_SAVED = re.compile(r"(?P<name>.+)\.modules_to_save\.\w+\.(?P<end>\w+)")


def _videoscore(work: Conversion) -> tuple[dict[str, Any], list[Path]]:
    """The shards as they are: their names are transformers' Idefics2Model and `score`."""
    shards = _shards(work.source)
    found = {name: shape for path in shards for name, shape in shapes_in(path).items()}
    known = {name for name in found if name.startswith(_PARTS)}
    absent = [part for part in _PARTS if not any(name.startswith(part) for name in known)]
    check_names(found, known | _SCORE | {f"{part}..." for part in absent}, work.source)
    width = found["score.weight"][-1]
    if found["score.weight"] != (_MARKS, width) or found["score.bias"] != (_MARKS,):
        raise ConvertError(f"{work.source}: score.weight is {found['score.weight']}, not ({_MARKS}, {width})")
    for path in shards:
        _linked(path, work.folder / path.name)
    copy_texts(work.source, work.folder)
    return {}, shards


def _videoreward(work: Conversion) -> tuple[dict[str, Any], list[Path]]:
    """One file of weights: adapters merged, names of today's transformers, configuration and tokenizer."""
    from safetensors.torch import save_file

    pickled, settings = _videoreward_files(work.source)
    path, _ = work.tensors(pickled)
    merged = dict(_merged(read_all(path), _scale(settings), pickled))
    found = {new: tensor for name, tensor in merged.items() if (new := _renamed(name)) is not None}
    config = _configuration(work, found)
    _check_shapes(found, config, pickled)
    head = tuple(found["rm_head.weight"].shape)
    if head not in ((1, head[-1]), (3, head[-1])):
        raise ConvertError(f"{pickled}: rm_head.weight is {head}, not (1 or 3, hidden size)")
    save_file({name: tensor.contiguous() for name, tensor in found.items()},
              work.folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    config.save_pretrained(work.folder)
    copy_texts(pickled.parent / "tokenizer", work.folder)
    _check_markers(work.folder, config.text_config.vocab_size, pickled)
    inference = json.loads(settings.read_text("utf-8")).get("inference_config")
    return {"head_rows": head[0], "normalisation": inference}, [pickled]


def _shards(source: Path) -> list[Path]:
    if not source.is_dir():
        raise ConvertError(f"{source} is no folder: give that of the checkpoint, as it is on the hub")
    if not (found := sorted(source.glob("*.safetensors"))):
        raise ConvertError(f"{source}: no *.safetensors files")
    return found


def _linked(source: Path, target: Path) -> None:
    """Large files are not copied where the filesystem can name them twice."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy(source, target)


def _videoreward_files(source: Path) -> tuple[Path, Path]:
    """The newest `checkpoint-*/model.pth` (or `.safetensors`), and `model_config.json`."""
    both = (
        path for name in ("model.pth", "model.safetensors") for path in source.glob(f"checkpoint-*/{name}")
    )
    found = sorted(both, key=lambda path: _step(path.parent.name))
    settings = source / "model_config.json"
    if not found or not settings.is_file():
        raise ConvertError(
            f"{source}: give the folder that has model_config.json and checkpoint-*/model.pth, as on the hub"
        )
    return found[-1], settings


def _step(name: str) -> int:
    end = name.rpartition("-")[2]
    return int(end) if end.isdigit() else -1


def _scale(settings: Path) -> float:
    """What LoRA's product is multiplied with: alpha / r (2 in the published weights)."""
    try:
        lora = json.loads(settings.read_text("utf-8"))["peft_lora_config"]
        rank, alpha = float(lora["lora_r"]), float(lora["lora_alpha"])
        return alpha / (math.sqrt(rank) if lora.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConvertError(f"{settings}: peft_lora_config has no lora_r and lora_alpha: {error!r}") from error


def _merged(found: dict[str, Any], scale: float, source: Path) -> Iterator[tuple[str, Any]]:
    """The weights without adapters: W + scale * B A in float32, in W's own type."""
    found = {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}
    sides = {"A": {}, "B": {}}  # type: dict[str, dict[str, Any]]
    for name in list(found):
        if match := _LORA.fullmatch(name):
            sides[match["side"]][match["name"]] = found.pop(name)
        elif match := _SAVED.fullmatch(name):
            found.pop(f"{match['name']}.original_module.{match['end']}", None)
            found[f"{match['name']}.{match['end']}"] = found.pop(name)
    if left := [name for name in found if ".lora_" in name]:
        raise ConvertError(f"{source}: adapters of this form are not known: {', '.join(left[:3])}")
    if sides["A"].keys() != sides["B"].keys():
        raise ConvertError(
            f"{source}: adapters without their other half: {sides['A'].keys() ^ sides['B'].keys()}"
        )
    adapted = {f"{name}.base_layer.weight" for name in sides["A"]}
    if absent := adapted - found.keys():
        raise ConvertError(f"{source}: adapters without a layer: {', '.join(sorted(absent)[:3])}")
    for name, tensor in found.items():
        plain = name.replace(".base_layer.", ".")
        if name in adapted:
            layer = plain.removesuffix(".weight")
            added = sides["B"][layer].float() @ sides["A"][layer].float()
            tensor = (tensor.float() + scale * added).to(tensor.dtype)
        yield plain, tensor


def _renamed(name: str) -> str | None:
    """A legacy name as transformers has it today; None for the unused head of the language model."""
    if name == "lm_head.weight":
        return None
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def _configuration(work: Conversion, found: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if work.base is None or not (work.base / "config.json").is_file():
        raise ConvertError("--base: give the folder of Qwen2-VL-2B-Instruct, or one with its config.json")
    config = AutoConfig.from_pretrained(work.base)
    if config.model_type != "qwen2_vl":
        raise ConvertError(f"--base: {work.base} is a {config.model_type} and no qwen2_vl")
    embedding = found.get("model.language_model.embed_tokens.weight")
    if embedding is not None:
        config.text_config.vocab_size = len(embedding)
    return config


def _check_shapes(found: dict[str, Any], config: Any, source: Path) -> None:
    import torch
    from transformers import Qwen2VLModel

    with torch.device("meta"):
        wanted = {f"model.{name}": t.shape for name, t in Qwen2VLModel(config).state_dict().items()}
    check_names(found, {*wanted, "rm_head.weight"}, source)
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ConvertError(
                f"{source}: {name} is {tuple(found[name].shape)}, --base makes it {tuple(shape)}"
            )


def _check_markers(folder: Path, words: int, source: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise ConvertError(f"{source.parent}: no tokenizer/tokenizer.json beside {source.name}")
    known = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    if absent := [marker for marker in MARKERS if known.get(marker, words) >= words]:
        raise ConvertError(
            f"{source.parent}/tokenizer: {', '.join(absent)} is no token of the model's {words}"
        )


KINDS = {
    "videoscore": RewardKind(
        _videoscore,
        {
            "frames": "at most 16 (v1) or 48 (v1.1): int(arange(0, T, T/most)), or all; shortest edge 378, "
            "longest 980, bilinear; mean and standard deviation 0.5",
            "dtype": "bfloat16",
            "positions": "of image patches, computed in float32",
        },
        ("REGRESSION_QUERY_PROMPT", "49b386d9ea300376"),
    ),
    "videoreward": RewardKind(
        _videoreward,
        {
            "frames": "2 a second, even, at least 4: linspace(0, T-1, n) rounded; multiples of 28, at most "
            "200704 pixels, bicubic with antialias on uint8; CLIP's mean and standard deviation",
            "dtype": "bfloat16",
            "positions": "sequential on all three axes of the rotary embedding",
        },
        ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN", TEMPLATE_HASH),
    ),
}
