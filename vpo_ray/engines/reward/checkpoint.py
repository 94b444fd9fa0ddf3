"""The published CogVLM2-Video checkpoint: its config.json, its tensor names, and how it is read.

Tensors are read by their published names from safetensors files (one, or shards with an index), directly into
a model built on the meta device, one open shard at a time, so that 12.5 B parameters are never in memory
twice. No remote code is run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_ray.files.weight_files import lone_problems, tensor_headers
from vpo_ray.storage.model_cache import fetch

ARCHITECTURE = "CogVLMVideoForCausalLM"
INDEX = "model.safetensors.index.json"
TensorShape = tuple[int, ...]
_FLOATS = ("F64", "F32", "F16", "BF16")


class CheckpointError(ValueError):
    """A folder that is not a usable CogVLM2-Video checkpoint; the message says why."""

    stops_run = True  # see stream/stops.py


@dataclass(frozen=True)
class VisionConfig:
    """The EVA2-CLIP-E tower. A frame becomes (image_size / patch_size / 2)**2 + 2 tokens."""

    hidden_size: int
    image_size: int
    in_channels: int
    intermediate_size: int
    layer_norm_eps: float
    num_heads: int
    num_hidden_layers: int
    num_positions: int
    patch_size: int

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame: 2 x 2 patches merged into one, between boi and eoi."""
        return (self.grid // 2) ** 2 + 2


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the model is built from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_multi_query_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    bos_token_id: int
    pad_token_id: int
    vision: VisionConfig

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def read_config(folder: str | Path) -> Config:
    """Read and check config.json.

    Raises:
        CheckpointError: no such file, another architecture, a missing field, or sizes that
            contradict each other.
    """
    path = Path(folder) / "config.json"
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot read it ({error}); reward.model is a folder with a CogVLM2-Video checkpoint"
        ) from error
    if not isinstance(tree, dict) or ARCHITECTURE not in (tree.get("architectures") or []):
        found = tree.get("architectures") if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(f"{path}: architectures is {found}, this reward model is {ARCHITECTURE}")
    config = Config(**_fields(Config, tree, path, ""), vision=_vision(tree, path))
    vision = config.vision
    positions = vision.grid**2 + 1
    wrong = {
        "hidden_size is not a multiple of num_attention_heads": config.hidden_size
        % config.num_attention_heads,
        "num_attention_heads is not a multiple of num_multi_query_heads": config.num_attention_heads
        % config.num_multi_query_heads,
        "vision_config.hidden_size is not a multiple of num_heads": vision.hidden_size % vision.num_heads,
        "vision_config: an odd number of patches a side cannot be merged 2 x 2": vision.grid % 2,
        f"vision_config.num_positions is {vision.num_positions}, {vision.grid} x {vision.grid} patches and "
        f"cls make {positions}": vision.num_positions != positions,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise CheckpointError(f"{path}: {message}")
    return config


def _vision(tree: dict[str, Any], path: Path) -> VisionConfig:
    vision = tree.get("vision_config")
    if not isinstance(vision, dict):
        raise CheckpointError(f"{path}: vision_config is missing")
    return VisionConfig(**_fields(VisionConfig, vision, path, "vision_config."))


def _fields(cls: type, tree: dict[str, Any], path: Path, prefix: str) -> dict[str, Any]:
    names = [name for name in cls.__dataclass_fields__ if name != "vision"]  # type: ignore[attr-defined]
    missing = [name for name in names if not isinstance(tree.get(name), int | float)]
    if missing:
        raise CheckpointError(f"{path}: no number for {', '.join(prefix + name for name in missing)}")
    return {name: tree[name] for name in names}


def tensor_shapes(config: Config) -> dict[str, TensorShape]:
    """Every tensor of the checkpoint by its published name (facts: the released shards)."""
    d, ffn, v = config.hidden_size, config.intermediate_size, config.vision
    qkv = d + 2 * config.num_multi_query_heads * config.head_dim
    shapes: dict[str, TensorShape] = {
        "lm_head.weight": (config.vocab_size, d),
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (d,),
            f"{layer}post_attention_layernorm.weight": (d,),
            f"{layer}self_attn.language_expert_query_key_value.weight": (qkv, d),
            f"{layer}self_attn.language_expert_dense.weight": (d, d),
            f"{layer}self_attn.rotary_emb.inv_freq": (config.head_dim // 2,),
            f"{layer}mlp.language_mlp.gate_proj.weight": (ffn, d),
            f"{layer}mlp.language_mlp.up_proj.weight": (ffn, d),
            f"{layer}mlp.language_mlp.down_proj.weight": (d, ffn),
        }
    w, tower = v.hidden_size, "model.vision."
    shapes |= {
        f"{tower}boi": (1, 1, d),
        f"{tower}eoi": (1, 1, d),
        f"{tower}patch_embedding.cls_embedding": (1, w),
        f"{tower}patch_embedding.position_embedding.weight": (v.num_positions, w),
        f"{tower}patch_embedding.proj.weight": (w, v.in_channels, v.patch_size, v.patch_size),
        f"{tower}patch_embedding.proj.bias": (w,),
        f"{tower}conv.weight": (w, w, 2, 2),
        f"{tower}conv.bias": (w,),
        f"{tower}linear_proj.linear_proj.weight": (d, w),
        f"{tower}linear_proj.norm1.weight": (d,),
        f"{tower}linear_proj.norm1.bias": (d,),
        f"{tower}linear_proj.gate_proj.weight": (ffn, d),
        f"{tower}linear_proj.dense_h_to_4h.weight": (ffn, d),
        f"{tower}linear_proj.dense_4h_to_h.weight": (d, ffn),
    }
    for i in range(v.num_hidden_layers):
        layer = f"{tower}transformer.layers.{i}."
        for name, shape in {
            "attention.query_key_value": (3 * w, w),
            "attention.dense": (w, w),
            "mlp.fc1": (v.intermediate_size, w),
            "mlp.fc2": (w, v.intermediate_size),
        }.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}{norm}.weight": (w,), f"{layer}{norm}.bias": (w,)}
    return shapes


def model_folder(key: str, name: str) -> Path:
    """A local folder, this node's copy of a URI, or the files of a hub id (no remote code among them).

    Raises:
        CheckpointError: there is no such model; `key` names it in the message.
    """
    name = fetch(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"{key}: {name} is neither a folder here nor a hub id that could be fetched: {error}"
        ) from error


def shard_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, from its index where it has one.

    Raises:
        CheckpointError: none there, or a shard that the index names is absent.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text("utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: {INDEX} names {', '.join(absent)}, not found there; download the checkpoint again"
        )
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors files; rewards are read from safetensors only")
    return files


def check_tensors(folder: str | Path, expected: dict[str, TensorShape]) -> None:
    """Compare the names, shapes and types in the shards' headers with the expected ones.

    Raises:
        CheckpointError: lists every missing, unexpected, misshapen and quantised tensor (the first ten each),
            or says which file is not whole.
    """
    found: dict[str, tuple[str, TensorShape]] = {}
    for path in shard_files(folder):
        if problem := next(lone_problems(path), None):
            raise CheckpointError(problem)
        found |= tensor_headers(path)
    both = sorted(found.keys() & expected.keys())
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} is {list(found[name][1])}, config.json makes it {list(expected[name])}"
            for name in both
            if found[name][1] != expected[name]
        ],
        "quantised": [f"{name} is {found[name][0]}" for name in both if found[name][0] not in _FLOATS],
    }
    lines = [
        f"  {len(names)} {kind}: {', '.join(names[:10])}" + (", ..." if len(names) > 10 else "")
        for kind, names in problems.items()
        if names
    ]
    if prefix := _prefix(found, expected):
        lines = [f"  every name begins with {prefix!r}, as a wrapper saves them: save them without it"]
    if lines:
        raise CheckpointError(f"{folder}: its tensors do not fit its config.json\n" + "\n".join(lines))


def _prefix(found: Collection[str], expected: Collection[str]) -> str | None:
    """What stands before every expected name, where these are the names but for that."""
    first = next(iter(expected))
    ends = [name.removesuffix(first) for name in found if name.endswith(first)]
    return next(
        (head for head in ends if head and {f"{head}{name}" for name in expected} == set(found)), None
    )


def read_tensors(folder: str | Path, device: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) with one shard open at a time, each tensor straight to the device; those whose
    names begin with `prefix`."""
    from safetensors import safe_open

    for path in shard_files(folder):
        with safe_open(path, "pt", device=device) as shard:
            for name in shard.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    yield name, shard.get_tensor(name)
