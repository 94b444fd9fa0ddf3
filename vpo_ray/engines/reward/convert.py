"""Published checkpoints of rewards as this package reads them: safetensors, and a card of what they are.

`vpo convert-reward` calls `convert_reward`. Pickles are opened by `files.pickles`, in a process of their own.
A folder appears whole or not at all. What a kind's tensors are called is in the module of the kind:
`convert_clip` (LAION's aesthetic predictor and MPS) and `convert_llm` (VideoScore and VideoReward).
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from vpo_ray.engines.reward import convert_clip, convert_llm
from vpo_ray.engines.reward.conversion import (
    PICKLED,
    Conversion,
    ConvertError,
    RewardKind,
    file_hash,
    shapes_in,
)
from vpo_ray.files.folder import share
from vpo_ray.files.text_files import TextFileError, decode
from vpo_ray.versions import versions

logger = logging.getLogger(__name__)

CARD, TEMPLATE = "card.json", "template.txt"


def reward_kinds() -> dict[str, RewardKind]:
    """The kinds that can be converted, by the names that recipes have for them."""
    return {**convert_clip.KINDS, **convert_llm.KINDS}


def convert_reward(
    kind: str, source: Path, target: Path, base: Path | None = None, template: Path | None = None
) -> dict[str, Any]:
    """Write the folder `target` from a published checkpoint, and give its card.

    Args:
        base: the folder of the model that the weights are for: of `videoreward` Qwen2-VL-2B-Instruct, of
            `mps` CLIP-ViT-H-14, whose configuration (and tokenizer) is copied.
        template: the prompt that the weights were trained with: a text file, or upstream's Python file, which
            is read and not run.

    Raises:
        ConvertError: something is there at `target`, or `source` is not of this kind.
        PickleError: a pickle that wants to run code, or cannot be read.
    """
    found = reward_kinds()[kind]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConvertError(f"{target} is there already: name a new folder")
    if not source.exists():
        raise ConvertError(f"no such file or folder: {source}")
    if template is not None and found.template is None:
        raise ConvertError(f"{kind} has no template: leave --template out")
    text = _template(template, found) if template is not None else None
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        own, sources = found.write(Conversion(source, part, base))
        (part / PICKLED).unlink(missing_ok=True)
        card = {
            "kind": kind,
            "vpo-ray": versions().get("vpo-ray"),
            "sources": {
                path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in sources
            },
            **found.says,
            **own,
            **_template_facts(text, found, part),
            **_weights(part),
        }
        (part / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")
        share(part)
        if target.exists():
            target.rmdir()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return card


def _template(path: Path, kind: RewardKind) -> str:
    name = kind.template[0] if kind.template else ""
    try:
        raw = path.read_bytes()
        text = decode(raw, path)
    except (OSError, TextFileError) as error:
        raise ConvertError(f"--template: cannot read {path}: {error}") from error
    if path.suffix != ".py":
        return text
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ConvertError(f"--template: {path} is no Python file: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            named = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if name in named and isinstance(node.value.value, str):
                return node.value.value
    raise ConvertError(f"--template: {path} has no text {name}")


def _template_facts(text: str | None, kind: RewardKind, folder: Path) -> dict[str, Any]:
    if kind.template is None:
        return {}
    name, digits = kind.template
    if text is None:
        return {"template": {"name": name, "trained_with": digits, "sha256": None}}
    (folder / TEMPLATE).write_bytes(text.encode())
    found = hashlib.sha256(text.encode()).hexdigest()
    if not found.startswith(digits):
        logger.warning(
            "the template has the hash %s, and the weights were trained with one of %s", found[:16], digits
        )
    return {"template": {"name": name, "trained_with": digits, "sha256": found}}


def _weights(folder: Path) -> dict[str, Any]:
    """What the card says of all tensors: names, shapes and types, and check values that need no second
    reading of the source: a hash of names and bytes, and the norm of all numbers."""
    from safetensors import safe_open

    digest, square, tensors = hashlib.sha256(), 0.0, {}
    files = {name: path for path in sorted(folder.glob("*.safetensors")) for name in shapes_in(path)}
    for name in sorted(files):
        with safe_open(files[name], "pt") as file:
            tensor = file.get_tensor(name)
        kind = str(tensor.dtype).removeprefix("torch.")
        tensors[name] = [kind, list(tensor.shape)]
        digest.update(json.dumps([name, *tensors[name]]).encode())
        digest.update(_bytes(tensor))
        if tensor.is_floating_point():
            square += float(tensor.double().square().sum())
    return {"check": {"sha256": digest.hexdigest(), "norm": square**0.5}, "tensors": tensors}


def _bytes(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
