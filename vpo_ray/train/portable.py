"""Exports for older readers: what transformers 5 and peft write, also under the keys of earlier versions.

transformers 4 (older vLLM, other trainers) reads RoPE from `rope_theta` and `rope_scaling`, precision from
`torch_dtype`, a tokenizer's class by a name that it knows, and its control tokens from
`additional_special_tokens`. transformers 5 reads these as it reads its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Class names new in transformers 5, and what they were called before.
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
# Where the tokenizer was loaded from here.
_LOCAL = ("is_local", "local_files_only")
# Where layers differ, transformers 4 has keys for two kinds (Gemma 3).
_FULL, _SLIDING = "full_attention", "sliding_attention"
# The only RoPE keys besides `type` that transformers 4 accepts for Phi 3.
_PHI3 = ("short_factor", "long_factor")
# Keys that every version of peft reads. Others are written where they are not defaults.
_ADAPTER = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "target_modules", "modules_to_save", "bias", "fan_in_fan_out", "init_lora_weights",
    "use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "auto_mapping",
})  # fmt: skip


def for_older_readers(folder: Path) -> None:
    """Complete `config.json`, `tokenizer_config.json` and `adapter_config.json` of a folder, where present.
    What the installed versions read from them does not change."""
    for name, complete in (
        ("config.json", _config),
        ("tokenizer_config.json", _tokenizer),
        ("adapter_config.json", _adapter),
    ):
        path = folder / name
        if path.is_file():
            tree = json.loads(path.read_text("utf-8"))
            complete(tree, folder)
            path.write_text(json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _config(tree: dict[str, Any], folder: Path) -> None:
    for value in tree.values():
        if isinstance(value, dict) and "model_type" in value:
            _config(value, folder)  # the text model of a vision-language model
    if isinstance(tree.get("dtype"), str):
        tree["torch_dtype"] = tree["dtype"]
    rope = tree.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if isinstance(rope.get(_FULL), dict):
        sliding = rope.get(_SLIDING)
        if isinstance(sliding, dict) and "rope_theta" in sliding:
            tree["rope_local_base_freq"] = sliding["rope_theta"]
        rope = rope[_FULL]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            tree[key] = rope[key]
    if rope.get("rope_type", "default") != "default":
        own = ("rope_theta", "partial_rotary_factor")
        tree["rope_scaling"] = {key: value for key, value in rope.items() if key not in own}
        if tree.get("model_type") == "phi3":
            tree["rope_scaling"] = {"type": rope["rope_type"], **{key: rope.get(key) for key in _PHI3}}


def _tokenizer(tree: dict[str, Any], folder: Path) -> None:
    for key in _LOCAL:
        tree.pop(key, None)
    if (name := tree.get("tokenizer_class")) in _CLASSES:
        tree["tokenizer_class"] = _CLASSES[name]
    extra = tree.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 takes a mapping of names under this key
        del tree["extra_special_tokens"]
        tree["additional_special_tokens"] = extra
    template = folder / "chat_template.jinja"
    if template.is_file():
        tree["chat_template"] = template.read_text("utf-8")


def _adapter(tree: dict[str, Any], folder: Path) -> None:
    from peft import LoraConfig

    unset = LoraConfig().to_dict()
    for key in [key for key in tree if key not in _ADAPTER]:
        if key in unset and tree[key] == unset[key]:
            del tree[key]
