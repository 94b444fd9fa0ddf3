"""The result of training: an ordinary Hugging Face folder that transformers and vLLM load.

Safetensors (of the whole policy, or of a LoRA adapter), the tokenizer with the task prompt in its
chat template, a generation config that stops at the end-of-turn token, a model card, and last
`vpo.json`.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vpo_ray.prompts.image_places import TRAINED_PLACES
from vpo_ray.records import Row
from vpo_ray.storage.model_cache import fetch
from vpo_ray.train.model_files import MARKER, publish
from vpo_ray.train.portable import for_older_readers

# Of the processor of a model that sees.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

if TYPE_CHECKING:
    from vpo_ray.train.phase import Job


def export_policy(model: Any, weights: dict[str, Any], job: Job, facts: Row) -> None:
    """Write the folder atomically, replacing an older one.

    Args:
        model: the policy's transformers or peft model; its weights are not read.
        weights: the full weights by name, or with LoRA those of the adapter.
        job: says where and how; the last token of its `end` stops generation.
        facts: what goes to `vpo.json` and the model card.
    """
    from vpo_ray.train.lora import merged

    lora = job.settings.lora
    base = fetch(job.model, weights=lora is not None and lora.merge)
    facts = {
        **facts,
        "license": job.settings.license or base_license(base),
        "lora": lora and lora.model_dump(),
    }

    def whole(adapter: Path) -> Any:
        dtype = next(iter(weights.values())).dtype
        return merged(base, job.revision, job.trust_remote_code, dtype, adapter)

    with tempfile.TemporaryDirectory(prefix="vpo-export-") as name:
        folder = Path(name, "policy")
        write_policy(model, weights, job, folder, whole)
        (folder / "README.md").write_text(model_card(facts), "utf-8")
        (folder / MARKER).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
        publish(folder, job.out)


def write_policy(
    model: Any, weights: dict[str, Any], job: Job, folder: Path, merged: Callable[[Path], Any]
) -> Any:
    """Write everything but the model card and the marker; `rehearsal` calls this without weights.

    Args:
        merged: from the adapter's folder to the base model with the adapter merged into it.

    Returns:
        The generation config that was written.
    """
    from vpo_ray.train.lora import save_adapter

    lora = job.settings.lora
    generation = generation_config(model, job.end)
    if lora is not None:
        adapter = folder.with_name("adapter") if lora.merge else folder
        save_adapter(model, weights, job.model, adapter)
        if lora.merge:
            model = merged(adapter)
            weights = model.state_dict() if weights else {}
    if lora is None or lora.merge:
        model.config.use_cache = True
        # Old models' config.json has generation parameters, which are in the generation config by now.
        for key in model.config._get_generation_parameters():
            delattr(model.config, key)
        # save_pretrained refuses a generation config for what loading only warns about.
        model.generation_config = type(generation)()
        model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
        if model.config.model_type in TRAINED_PLACES:
            copy_processor(job.model, job.revision, folder)
    write_generation(generation, folder)
    job.tokenizer.save_pretrained(folder)
    for_older_readers(folder)
    return generation


def generation_config(model: Any, end: list[int]) -> Any:
    """The model's own generation config, which also stops at the last token of `end`."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)  # a custom model may have none
    generation = copy.deepcopy(own) if own is not None else GenerationConfig.from_model_config(model.config)
    stops = generation.eos_token_id if generation.eos_token_id is not None else []
    stops = [stops] if isinstance(stops, int) else list(stops)
    generation.eos_token_id = list(dict.fromkeys([end[-1], *stops]))
    return generation


def copy_processor(model: str, revision: str | None, folder: Path) -> None:
    """Copy what says how a model's images become tokens; the chat template is the tokenizer's."""
    from transformers.utils import cached_file

    local = fetch(model, weights=False)
    for name in PROCESSOR_FILES:
        found = cached_file(local, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            tree = json.loads(Path(found).read_text("utf-8"))
            tree.pop("chat_template", None)
            (folder / name).write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", "utf-8")


def write_generation(generation: Any, folder: Path) -> None:
    """Write generation_config.json; `save_pretrained` would refuse what loading only warns about."""
    generation.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])


def base_license(folder: str) -> str:
    """The licence that the base model's own card names, `other` where it names none."""
    card = Path(folder, "README.md")
    parts = card.read_text("utf-8", "replace").split("---", 2) if card.is_file() else []
    try:
        header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except yaml.YAMLError:
        header = {}
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) else "other"


def model_card(facts: Row) -> str:
    """The README of a trained policy. Names from the recipe are data: they go into code spans."""
    counts = "".join(f"| dropped: {reason} | {n} |\n" for reason, n in sorted(facts["dropped"].items()))
    metrics = "".join(f"| {name} | {value:.6g} |\n" for name, value in facts["metrics"].items())
    warned = "".join(f"\n> **Warning:** {text}\n" for text in facts["warnings"])
    method = {
        "sft": "supervised fine-tuning",
        "dpo": "direct preference optimisation",
        "rl": "group-relative policy optimisation",
    }[facts["phase"]]
    lora, license = facts["lora"], facts["license"]
    if lora:
        method += f" of LoRA adapters (rank {lora['r']}{', merged' if lora['merge'] else ''})"
    return (
        "---\n"
        f"library_name: {'peft' if lora and not lora['merge'] else 'transformers'}\n"
        "pipeline_tag: text-generation\n"
        f"{_base_line(facts['base_model'])}"
        f"license: {json.dumps(license)}\n"
        f"{'license_name: inherited-from-base-model' + chr(10) if license == 'other' else ''}"
        "tags: [text-to-video, prompt-optimization]\n"
        "---\n\n"
        "# A prompt optimiser for text-to-video\n\n"
        "It rewrites a user's query into a prompt for a video model. Its task prompt is part of the chat "
        "template: send the query alone, as one user message.\n\n"
        f"Made from {_code(facts['base_model'])} by {method} ([VPO](https://arxiv.org/abs/2503.20491)). "
        f"Licence: {_code(license)}; the base model's applies.\n{warned}\n"
        "| | |\n|---|---|\n"
        f"| recipe fingerprint | {_code(facts['fingerprint'])} |\n"
        f"| optimizer steps | {facts['steps']} |\n"
        f"| step of these weights | {facts['exported_step']} |\n"
        f"| rows | {facts['rows']} |\n"
        f"| held-out rows | {facts['held_out']} |\n"
        f"{counts}\n"
        "Metrics of that step (`eval_`: of the held-out rows):\n\n"
        "| metric | value |\n|---|---|\n"
        f"{metrics}"
    )


def _base_line(model: str) -> str:
    """The hub takes an id only."""
    return f"base_model: {json.dumps(model)}\n" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) else ""


def _code(text: str) -> str:
    return "`" + "".join(c if c.isprintable() and c not in "`|<>" else "?" for c in text) + "`"
