"""Tiny checkpoints of Prompt-A-Video's scorers under the published tensor names, with random weights.

Any of their sizes may be another, for measurements. Texts are read by the letter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vpo_ray.engines  # noqa: F401  it quietens what transformers says of torchao

Sizes = dict[str, Any]
# No words that any weights were trained with.
TINY_QUERY_PROMPT = '\nJudge the clip.\nIts text is "{text_prompt}",\nand these are its frames:\n'
_LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
_PROJECTION = 48


def make_tiny_clip(folder: Path, activation: str, seed: int = 3, sizes: Sizes | None = None) -> None:
    """A CLIP with its tokenizer.

    Args:
        sizes: fields of `vision`, of `text`, and `projection`.
    """
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(seed)
    sizes = sizes or {}
    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    shape: Sizes = {"intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape["hidden_act"] = activation
    text = {**shape, "hidden_size": 32, "max_position_embeddings": 240, **sizes.get("text", {})}
    # The published CLIP-H has the old, wrong eos_token_id.
    text |= {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 2}
    vision = {**shape, "hidden_size": 40, "image_size": 32, "patch_size": 8, **sizes.get("vision", {})}
    projection = sizes.get("projection", _PROJECTION)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    _stirred(CLIPModel(config), 0.15).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)


def make_tiny_heads(folder: Path, width: int = _PROJECTION) -> None:
    """`v1.safetensors` and `v2.safetensors`: LAION's aesthetic heads."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(5)
    save_file({"weight": torch.randn(1, width), "bias": torch.randn(1)}, folder / "v1.safetensors")
    layers = {}
    for number, output in zip((0, 2, 4, 6, 7), (32, 16, 8, 4, 1), strict=True):
        layers[f"layers.{number}.weight"] = torch.randn(output, width) * 0.4
        layers[f"layers.{number}.bias"] = torch.randn(output)
        width = output
    save_file(layers, folder / "v2.safetensors")


def make_tiny_mps(folder: Path, activation: str = "gelu", sizes: Sizes | None = None) -> None:
    """An MPS in the folder's layout that `kind: mps` reads.

    Args:
        sizes: as `make_tiny_clip`'s; also `heads`, `head_dim`, `inner` and `layers` of the cross model.
    """
    import torch
    from safetensors.torch import load_file, save_file

    sizes = {"heads": 6, "head_dim": 8, "inner": 64, "layers": 2, "projection": _PROJECTION, **(sizes or {})}
    make_tiny_clip(folder, activation, 7, sizes)
    tensors = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    # Words are more and less like each other in few dimensions only.
    dim, width = tensors["model.text_projection.weight"].shape
    tensors["model.text_projection.weight"] = torch.randn(dim, 2) @ torch.randn(2, width) * 0.1
    head_dim, inner, wide = sizes["head_dim"], sizes["inner"], sizes["heads"] * sizes["head_dim"]
    for i in range(sizes["layers"]):
        cross, own = (f"cross_model.layers.{i}.{block}.fn." for block in (0, 1))
        shapes = {
            f"{cross}to_q.weight": (wide, dim),
            f"{cross}to_kv.weight": (2 * head_dim, dim),
            f"{cross}to_out.weight": (dim, wide),
            f"{cross}ff.0.weight": (2 * inner, dim),
            f"{cross}ff.2.weight": (dim, inner),
            f"{own}fused_attn_ff_proj.weight": (wide + 2 * head_dim + 2 * inner, dim),
            f"{own}attn_out.weight": (dim, wide),
            f"{own}ff_out.1.weight": (dim, inner),
        }
        tensors |= {name: torch.randn(shape) * 2 / shape[1] ** 0.5 for name, shape in shapes.items()}
        for block in (cross, own):
            tensors[f"{block}norm.weight"] = 1 + 0.2 * torch.randn(dim)
            tensors[f"{block}norm.bias"] = torch.zeros(dim)
        tensors[f"{own}rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    save_file(tensors, folder / "model.safetensors")


def make_tiny_videoscore(folder: Path, sizes: Sizes | None = None) -> None:
    """A VideoScore, and `query_prompt.txt` with another text than the published one.

    Args:
        sizes: fields of `vision`, `text` and `perceiver`.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Idefics2Config, Idefics2Model

    torch.manual_seed(11)
    sizes = sizes or {}
    tokenizer = _llama2_tokenizer()
    tokenizer.save_pretrained(folder)
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 980, "patch_size": 14, **sizes.get("vision", {}),
    }  # fmt: skip
    text = {
        "model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": 0,
        "max_position_embeddings": 2048, **sizes.get("text", {}),
    }  # fmt: skip
    perceiver = {
        "hidden_size": text["hidden_size"], "resampler_n_latents": 4, "resampler_depth": 1,
        "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1,
        **sizes.get("perceiver", {}),
    }  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics2Config(
        vision_config=vision, text_config=text, perceiver_config=perceiver, image_token_id=image
    )
    model = _stirred(Idefics2Model(config), 0.1)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {"score.weight": torch.randn(5, text["hidden_size"]) * 0.3, "score.bias": torch.randn(5)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.architectures = ["Idefics2ForSequenceClassification"]
    config.save_pretrained(folder)
    (folder / "query_prompt.txt").write_text(TINY_QUERY_PROMPT, "utf-8")


def _stirred(model: Any, by: float) -> Any:
    """Its own beginning hardly tells images apart."""
    import torch

    for parameter in model.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return model.eval()


def _llama2_tokenizer() -> Any:
    """As Llama 2's: white space is a token, one of it and BOS come first."""
    from tokenizers import Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "\n", "▁", *_LETTERS, "<fake_token_around_image>", "<image>"]
    ids = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        additional_special_tokens=["<fake_token_around_image>", "<image>"],
    )  # fmt: skip
