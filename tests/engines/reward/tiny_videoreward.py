"""A tiny Qwen2-VL with VideoReward's head and tokens, and a template of its shape."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>",
]  # fmt: skip
TEMPLATE = (
    "\nRate it.\nQuality: <|VQ_reward|>\nEND\nMotion: <|MQ_reward|>\nEND\n"
    "Textual prompt - {text_prompt}\nAlignment: <|TA_reward|>\nEND\n"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)


def tiny_backbone(seed: int = 0) -> Qwen2VLModel:
    """Of random weights that tell videos, texts and positions apart."""
    torch.manual_seed(seed)
    model = Qwen2VLModel(tiny_config(tiny_tokenizer())).eval()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model


def save_tiny(folder: Path, rows: int) -> Path:
    """As `vpo convert-reward videoreward` leaves it, with the template beside the weights."""
    tiny_backbone().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {f"model.{name.removeprefix('model.')}": tensor for name, tensor in weights.items()}
    weights["rm_head.weight"] = torch.randn(rows, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "template.txt").write_text(TEMPLATE, "utf-8")
    return folder
