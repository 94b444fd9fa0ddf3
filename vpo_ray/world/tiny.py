"""Tiny checkpoints of the real architectures: `vpo tiny FOLDER`.

The whole loop runs on them in minutes on a laptop's CPU: a Llama policy and judge, a CogVideoX
pipeline and a CogVLM2-Video reward model, with random weights and tokenizers trained on the
package's example texts. Everything is made from fixed seeds, so that two machines get the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import vpo_ray.engines  # noqa: F401  it quietens what transformers and diffusers say of torchao
from vpo_ray.files.text_files import read_lines

VERSION = 2
DATA = Path(__file__).parents[1] / "data"
_MARKER = "tiny.json"
# Prompts of the package among what the tokenizers are trained on: another one would change their tokens.
_PROMPTS = ("critique", "draft", "policy", "prefer", "prefer_videos", "rank", "refine", "safety")
LARGEST = 32 * 2**20  # bytes; no file of ours is nearly as large, and hardly a real checkpoint is smaller

# The control tokens and the chat form of Llama 3 Instruct; its pre-tokenizer's split pattern.
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

# Few questions of our own, enough to have dimensions, weights and a `[[prompt]]` slot.
QUESTIONS = (
    ('Does the clip show what "[[prompt]]" asks for?', 0.9, "alignment"),
    ('Does the clip leave out nothing that "[[prompt]]" names?', 0.6, "alignment"),
    ("Is the picture pleasant to look at?", 0.4, "quality"),
    ("Are the colors in harmony?", 0.3, "quality"),
    ("Is the picture sharp from start to end?", 0.5, "stability"),
    ("Do shapes stay the same through the clip?", 0.4, "stability"),
    ("Is there lively motion in the clip?", 0.3, "dynamics"),
    ("Does the camera move smoothly?", 0.2, "dynamics"),
)


class TinyError(ValueError):
    """A folder that holds what is not ours."""


def make_tiny(folder: str | Path) -> None:
    """Make `policy`, `judge`, `video` and `reward` in a folder; those already complete are kept."""
    folder = Path(folder).expanduser()
    for make in (make_policy, make_judge, make_video, make_reward):
        make(folder / make.__name__.removeprefix("make_"))


def make_policy(folder: str | Path) -> None:
    """A Llama 3 Instruct of 0.6 M parameters: the policy before SFT."""
    _make(folder, _llama, 1)


def make_judge(folder: str | Path) -> None:
    """The same architecture with other weights."""
    _make(folder, _llama, 2)


def make_video(folder: str | Path) -> None:
    """A CogVideoX pipeline: T5 encoder, 3D VAE, transformer and DDIM scheduler."""
    _make(folder, _cogvideox, 3)


def make_image_video(folder: str | Path) -> None:
    """As `make_video`, but an image-to-video one: its transformer sees the image's latents as well."""
    _make(folder, partial(_cogvideox, images=True), 3, images=True)


def make_vlm(folder: str | Path) -> None:
    """An Idefics3, as SmolVLM is one: a vision tower before a Llama of the policy's architecture."""
    _make(folder, _idefics3, 5)


def make_reward(folder: str | Path, sizes: dict[str, Any] | None = None) -> None:
    """A CogVLM2-Video in the published layout, with `checklist.yaml` beside it.

    Args:
        sizes: fields of config.json (and of its `vision_config`) to make a larger one with.
    """
    _make(folder, partial(_cogvlm2_video, sizes=sizes or {}), 4, sizes=sizes)


def _make(folder: str | Path, build: Callable[[Path], None], seed: int, **options: Any) -> None:
    folder = Path(folder)
    marker = {"version": VERSION, "seed": seed, **options}
    path = folder / _MARKER
    if path.exists() and json.loads(path.read_text("utf-8")) == marker:
        return
    if not path.exists() and (large := next((f for f in folder.rglob("*") if _is_large(f)), None)):
        raise TinyError(f"{folder} holds {large.name}, which is no tiny checkpoint's: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _seeded(seed):
        build(folder)
    # Last, so that a folder with a marker is a complete one.
    path.write_text(json.dumps(marker) + "\n", "utf-8")


def _is_large(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > LARGEST


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _texts() -> list[str]:
    """What the tokenizers are trained on: the example queries and prompts, and the task prompts."""
    lines = [line for path in sorted(DATA.glob("*.jsonl")) for line in read_lines(path)]
    rows = [json.loads(line) for line in lines]
    texts = [value for row in rows for value in row.values()]
    folder = Path(__file__).parents[1] / "prompts"
    prompts = [(folder / f"{name}.txt").read_text("utf-8") for name in _PROMPTS]
    return texts + prompts + [question for question, _, _ in QUESTIONS]


def llama3_tokenizer(vocab_size: int, words: tuple[str, ...] = (), texts: Sequence[str] | None = None) -> Any:
    """A byte-level BPE tokenizer as Llama 3's: special tokens after the vocabulary, BOS in front.

    Args:
        words: whole words that must be one token each (`ignore_merges` keeps them so).
        texts: what it is trained on; the package's example texts when None.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    # Words that must be single tokens are repeated, so that their merges come first.
    tokenizer.train_from_iterator(
        [*(texts or _texts()), *(word for word in words for _ in range(1000))], trainer
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in LLAMA3_SPECIAL])
    bos = LLAMA3_SPECIAL[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|reserved_special_token_0|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _llama(folder: Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = llama3_tokenizer(1024)
    tokenizer.chat_template = LLAMA3_TEMPLATE
    tokenizer.model_max_length = 4096
    ends = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _idefics3(folder: Path) -> None:
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        LlamaConfig,
    )

    tokenizer = llama3_tokenizer(1024)
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    marks += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = LLAMA3_TEMPLATE
    tokenizer.model_max_length = 2048
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        **ends,
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        dtype=torch.float32,
        **ends,
    )
    model = Idefics3ForConditionalGeneration(config)
    # As initialised, an image hardly changes a word.
    with torch.no_grad():
        model.model.connector.modality_projection.proj.weight.mul_(20)
    model.save_pretrained(folder)
    # As published ones: four parts of a picture of 112 pixels, and the whole once more.
    images = Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    processor.save_pretrained(folder)


def _t5_tokenizer() -> Any:
    """A T5 tokenizer on the example texts; every printable Latin-1 character is in its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[chr(c) for c in (*range(33, 127), *range(161, 256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=226)


def _cogvideox(folder: Path, images: bool = False) -> None:
    import torch
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    tokenizer = _t5_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=1.15258426,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8 if images else 4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=True,
    )
    # As initialised, a prompt hardly changes a pixel: stronger and sharper attention to it.
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn1.to_v.weight.mul_(4)
            block.attn1.to_out[0].weight.mul_(4)
            block.attn1.norm_q.weight.mul_(2)
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
    pipeline: Any = CogVideoXImageToVideoPipeline if images else CogVideoXPipeline
    pipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)


def _cogvlm2_video(folder: Path, sizes: dict[str, Any]) -> None:
    import torch
    import yaml
    from safetensors.torch import save_file

    from vpo_ray.engines.reward.checkpoint import ARCHITECTURE, read_config, tensor_shapes

    tokenizer = llama3_tokenizer(1024, words=("yes", "no", "Yes", "No", " yes", " no"))
    tree: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|end_of_text|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 2048,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_multi_query_heads": 2,
        "rms_norm_eps": 1e-05,
        "template_version": "chat",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vision_config": {
            "dropout_prob": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 32,
            "image_size": 56,
            "in_channels": 3,
            "intermediate_size": 64,
            "layer_norm_eps": 1e-06,
            "num_heads": 4,
            "num_hidden_layers": 2,
            "num_positions": 17,
            "patch_size": 14,
        },
        "vocab_size": -(-len(tokenizer) // 64) * 64,
    }
    tree["vision_config"] |= sizes.get("vision_config", {})
    tree |= {name: size for name, size in sizes.items() if name != "vision_config"}
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", "utf-8")
    config = read_config(folder)
    inv_freq = 1.0 / 500000.0 ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    tensors = {}
    for name, shape in sorted(tensor_shapes(config).items()):
        if name.endswith("inv_freq"):
            value = inv_freq
        elif "norm" in name:
            value = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        elif len(shape) == 1:
            value = torch.zeros(shape)
        else:
            # Fan-in scale keeps activations near one; pixels weigh more than positions.
            fan_in = 1 if "embed" in name or name.endswith("oi") else torch.Size(shape[1:]).numel()
            value = torch.randn(shape) * fan_in**-0.5
        if name.endswith("language_expert_query_key_value.weight"):
            # Sharper attention, so that questions look at different parts of a video.
            value[: config.hidden_size] *= 3
        tensors[name] = value.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    checklist = {"questions": [{"question": q, "weight": w, "dimension": d} for q, w, d in QUESTIONS]}
    (folder / "checklist.yaml").write_text(yaml.safe_dump(checklist, sort_keys=False, width=110), "utf-8")
