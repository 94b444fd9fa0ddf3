"""What training leaves: an ordinary Hugging Face folder that transformers and vLLM load.

Safetensors, the tokenizer with the task prompt in its chat template, a generation config that
stops at the end-of-turn token, a model card, and last `vpo.json`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from vpo_ray.records import Row
from vpo_ray.train.model_files import MARKER, publish


def export(model: Any, weights: dict[str, Any], tokenizer: Any, end: list[int], out: str, facts: Row) -> None:
    """Write the folder whole or not at all, replacing an older one.

    Args:
        model: the policy's transformers model; only its config and class are read.
        weights: the full weights by name.
        end: ids of the end-of-turn token(s); the last of them stops generation.
        out: local folder or URI.
        facts: what goes to `vpo.json` and the model card.
    """
    with tempfile.TemporaryDirectory(prefix="vpo-export-") as name:
        folder = Path(name)
        generation = model.generation_config
        stops = generation.eos_token_id if generation.eos_token_id is not None else []
        stops = [stops] if isinstance(stops, int) else list(stops)
        generation.eos_token_id = list(dict.fromkeys([end[-1], *stops]))
        model.config.use_cache = True
        model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(facts), "utf-8")
        (folder / MARKER).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
        publish(folder, out)


def model_card(facts: Row) -> str:
    """The README of a trained policy. Names from the recipe are data: they go into code spans."""
    counts = "".join(f"| dropped: {reason} | {n} |\n" for reason, n in sorted(facts["dropped"].items()))
    metrics = "".join(f"| {name} | {value:.6g} |\n" for name, value in facts["metrics"].items())
    method = {"sft": "supervised fine-tuning", "dpo": "direct preference optimisation"}[facts["phase"]]
    return (
        "---\n"
        "library_name: transformers\n"
        "pipeline_tag: text-generation\n"
        f"base_model: {json.dumps(facts['base_model'])}\n"
        "license: other\n"
        "license_name: inherited-from-base-model\n"
        "tags: [text-to-video, prompt-optimization]\n"
        "---\n\n"
        "# A prompt optimiser for text-to-video\n\n"
        "It rewrites a user's query into a prompt for a video model. Its task prompt is part of the chat "
        "template: send the query alone, as one user message.\n\n"
        f"Made from {_code(facts['base_model'])} by {method} ([VPO](https://arxiv.org/abs/2503.20491)). "
        "The base model's licence applies; set it in the header above before you publish.\n\n"
        "| | |\n|---|---|\n"
        f"| recipe fingerprint | {_code(facts['fingerprint'])} |\n"
        f"| optimizer steps | {facts['steps']} |\n"
        f"| rows | {facts['rows']} |\n"
        f"{counts}\n"
        "Metrics of the last step:\n\n"
        "| metric | value |\n|---|---|\n"
        f"{metrics}"
    )


def _code(text: str) -> str:
    return "`" + "".join(c if c.isprintable() and c not in "`|<>" else "?" for c in text) + "`"
