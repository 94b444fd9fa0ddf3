"""LoRA (arXiv 2106.09685) by peft: adapters on the policy, and how they are exported.

The adapters start at zero effect, so the policy before its first step is the base model: DPO's
reference needs no second model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vpo_ray.recipe import TrainLora
from vpo_ray.train.examples import TrainError


def attach(model: Any, lora: TrainLora) -> Any:
    """The model with adapters, everything else frozen; what is set apart (see `vision`) takes none.

    Raises:
        TrainError: `target_modules` names no layer, or the output embedding.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    from vpo_ray.train.vision import apart_pattern

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise TrainError(f"lora.target_modules {lora.target_modules!r}: {error}") from error
    # Those who load the adapter onto the whole model find more layers of these names.
    config.exclude_modules = apart_pattern(model)
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise TrainError(
            "lora.target_modules: the output embedding (lm_head) takes no adapter, leave it out: its "
            "logits are never made as a whole"
        )
    return adapted


def save_adapter(adapted: Any, weights: dict[str, Any], base: str, folder: Path) -> None:
    """Save the adapter as peft and vLLM load it.

    Args:
        weights: the trained parameters by name.
        base: named as the base model in the adapter's config.
    """
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template; we write our own


def merged(base: str, revision: str | None, trust: bool, dtype: Any, adapter: Path) -> Any:
    """The base model with the adapter added to its weights, on the CPU; see `merge`."""
    from peft import PeftModel
    from transformers import AutoConfig

    from vpo_ray.train.vision import auto_class

    given: Any = {"revision": revision, "trust_remote_code": trust}
    kind = auto_class(AutoConfig.from_pretrained(base, **given))
    model = kind.from_pretrained(base, **given, dtype=dtype)
    return merge(PeftModel.from_pretrained(model, str(adapter)))


def merge(adapted: Any, check: bool = True) -> Any:
    """The model with its adapter added to its weights.

    Raises:
        TrainError: a layer cannot be merged, or (with `check`) a merged weight is not a finite number.
    """
    try:
        return adapted.merge_and_unload(safe_merge=check)
    except ValueError as error:
        raise TrainError(f"the adapter cannot be merged: {error}") from error
