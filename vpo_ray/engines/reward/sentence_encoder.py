"""A small sentence encoder: texts become vectors that are near where the texts mean the same.

A checkpoint of sentence-transformers whose modules are a transformer, the mean over its tokens and a length
of 1, such as all-MiniLM-L6-v2, is read by transformers alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vpo_ray.engines.reward.checkpoint import CheckpointError, model_folder

_MODULES = ("Transformer", "Pooling", "Normalize")
KEPT = 4096  # texts whose vectors are kept: a query has several prompts


class SentenceEncoder:
    """Raises CheckpointError where it cannot be loaded; `key` names it in the message."""

    def __init__(self, key: str, name: str, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = model_folder(key, name)
        _refuse_other_modules(key, folder)
        try:
            model, loaded = AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{key}: {folder} cannot be loaded: {error}") from error
        # The mean does not take the pooler, which some checkpoints lack.
        if missing := sorted(n for n in loaded["missing_keys"] if "pooler" not in n):
            raise CheckpointError(
                f"{key}: {folder} has no {', '.join(missing[:3])}: {len(missing)} are missing"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(device).eval()
        self.length = _length(folder, self._tokenizer, model.config)
        self._turn = threading.Lock()  # a fast tokenizer takes one call at a time
        self._encoded = lru_cache(KEPT)(self._encode)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1: float32, shape (n, width). A text is cut at `length` tokens.

        Each is encoded by itself, so that its vector does not depend on the texts beside it.
        """
        return np.stack([self._encoded(text) for text in texts])

    def _encode(self, text: str) -> np.ndarray:
        with self._turn:
            tokens = self._tokenizer([text], truncation=True, max_length=self.length, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**tokens.to(self._model.device)).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)[0].cpu().numpy()


def _refuse_other_modules(key: str, folder: Path) -> None:
    """Raises CheckpointError where the checkpoint itself says that its vectors are made in another way."""
    modules, pooling = _json(folder / "modules.json"), _json(folder / "1_Pooling/config.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules or []]
    if others := [kind for kind in kinds if kind not in _MODULES]:
        raise CheckpointError(f"{key}: {folder} has the module {others[0]}; only a mean over tokens is known")
    on = [
        name for name, value in (pooling or {}).items() if name.startswith("pooling_mode") and value is True
    ]
    if on and on != ["pooling_mode_mean_tokens"]:
        raise CheckpointError(f"{key}: {folder} pools by {', '.join(on)}; only a mean over tokens is known")


def _length(folder: Path, tokenizer: Any, config: Any) -> int:
    known = [
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", None),
        (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length"),
    ]
    return min(int(length) for length in known if length)


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
