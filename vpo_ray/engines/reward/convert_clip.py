"""LAION's aesthetic predictors and MPS, which read CLIP's features; see `convert`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vpo_ray.engines.reward.conversion import (
    Conversion,
    ConvertError,
    RewardKind,
    check_names,
    copy_texts,
    file_hash,
    read_all,
)

# Layers of improved-aesthetic-predictor, which have dropout between them and no activations.
_V2 = (0, 2, 4, 6, 7)
# By the files' sha256 (LAION-AI/aesthetic-predictor).
_KNOWN = {"2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba": "sa_0_4_vit_l_14_linear.pth"}
_FRAMES = (
    "4 of a video, int(arange(0, T, T/4)); shorter side to 224 by Pillow's bicubic, centre crop; CLIP's mean "
    "and standard deviation; the mean of their scores"
)
_CROSS_0 = (
    "norm.weight", "norm.bias", "to_q.weight", "to_kv.weight", "to_out.weight", "ff.0.weight", "ff.2.weight",
)  # fmt: skip
_CROSS_1 = (
    "norm.weight", "norm.bias", "rotary_emb.inv_freq", "fused_attn_ff_proj.weight", "attn_out.weight",
    "ff_out.1.weight",
)  # fmt: skip
# Of CLIP, what a score is made with beside the layers of its towers.
_CLIP = (
    "logit_scale", "text_projection.weight", "visual_projection.weight",
    "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
    "text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias",
    "vision_model.embeddings.class_embedding", "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight", "vision_model.pre_layrnorm.weight",
    "vision_model.pre_layrnorm.bias", "vision_model.post_layernorm.weight",
    "vision_model.post_layernorm.bias",
)  # fmt: skip
_CLIP_LAYER = re.compile(
    r"(?P<layer>(text|vision)_model\.encoder\.layers\.\d+)\.(self_attn\.(q|k|v|out)_proj|layer_norm[12]|mlp\.fc[12])"
    r"\.(weight|bias)"
)


def _laion(work: Conversion) -> tuple[dict[str, Any], list[Path]]:
    """V1's linear layer, or V2's layers, with their own names: those tell the two apart."""
    from safetensors.torch import save_file

    path, _ = work.tensors(work.source)
    found = read_all(path)
    variant = "v2" if any(name.startswith("layers.") for name in found) else "v1"
    layers = [f"layers.{i}." for i in _V2] if variant == "v2" else [""]
    check_names(found, [f"{layer}{end}" for layer in layers for end in ("weight", "bias")], work.source)
    try:
        weight, bias = _one_map([(found[f"{layer}weight"], found[f"{layer}bias"]) for layer in layers])
    except RuntimeError as error:
        raise ConvertError(f"{work.source}: its layers do not fit each other: {error}") from error
    if weight.ndim != 2 or len(weight) != 1 or tuple(bias.shape) != (1,):
        shapes = tuple(weight.shape), tuple(bias.shape)
        raise ConvertError(f"{work.source}: weight and bias are {shapes}, not (1, features) and (1,)")
    kept = {name: tensor.float().contiguous() for name, tensor in found.items()}
    save_file(kept, work.folder / "head.safetensors")
    return {
        "variant": variant,
        "linear_map": {"norm": float(weight.norm()), "bias": float(bias)},
        "published_as": _KNOWN.get(file_hash(work.source)),
    }, [work.source]


def _one_map(layers: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Weight and bias, in float64, of linear layers one after another."""
    weight, bias = (tensor.double() for tensor in layers[0])
    for layer, shift in layers[1:]:
        weight, bias = layer.double() @ weight, layer.double() @ bias + shift.double()
    return weight, bias


def _mps(work: Conversion) -> tuple[dict[str, Any], list[Path]]:
    """The tensors of the module, with their names: `model.` is transformers' CLIPModel, whose configuration
    and tokenizer are those of `base`."""
    from safetensors.torch import save_file

    path, stood_in = work.tensors(work.source, stand_ins=True)
    # Older transformers kept the positions' own numbers among the weights.
    found = {name: tensor for name, tensor in read_all(path).items() if not name.endswith("position_ids")}
    check_names(found, _mps_names(found), work.source)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, work.folder / "mps.safetensors")
    if work.base is not None:
        copy_texts(work.base, work.folder)
    return {"stand_ins": stood_in}, [work.source]


def _mps_names(found: Iterable[str]) -> set[str]:
    """What a file with these layers must have."""
    found = set(found)
    wanted = {f"model.{name}" for name in _CLIP}
    layers = {
        match["layer"] for name in found if (match := _CLIP_LAYER.fullmatch(name.removeprefix("model.")))
    }
    for layer in layers:
        parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
                 "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")  # fmt: skip
        wanted |= {f"model.{layer}.{part}.{end}" for part in parts for end in ("weight", "bias")}
    blocks = {name.split(".")[2] for name in found if name.startswith("cross_model.layers.")} or {"0"}
    for block in blocks:
        wanted |= {f"cross_model.layers.{block}.0.fn.{name}" for name in _CROSS_0}
        wanted |= {f"cross_model.layers.{block}.1.fn.{name}" for name in _CROSS_1}
    return wanted


KINDS = {
    "laion_aesthetic": RewardKind(
        _laion,
        {"frames": _FRAMES, "dtype": "float32", "positions": "those of CLIP ViT-L/14 of OpenAI, quick_gelu"},
    ),
    "mps": RewardKind(
        _mps,
        {
            "frames": _FRAMES,
            "dtype": "bfloat16",
            "positions": "those of CLIP; rotary (base 10000) in the second block of the cross model's layers",
        },
    ),
}
