"""Recipe sections of training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vpo_ray.recipe.base import Amount, Fraction, Positive, Section


class Train(Section):
    """One training phase. `data` is read by SFT only; `beta`, `loss`, `label_smoothing`, `rpo_alpha`
    and `length_normalise` by DPO only."""

    data: str | None = Field(None, description="SFT data: JSONL or Parquet with `query` and `prompt`")
    epochs: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    beta: Annotated[float, Field(gt=0)] = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    rpo_alpha: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of an SFT term on chosen")
    length_normalise: bool = False
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1
    global_batch: Positive
    micro_batch: Positive = 1
    max_length: Positive = 2048
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    activation_checkpointing: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 3
    deepspeed: dict[str, Any] = {}
    save_steps: Positive | None = Field(None, description="steps between checkpoints to resume from")
    max_failures: Annotated[int, Field(ge=0)] = 2
    workers: Positive = 1
    use_gpu: bool = True
    resources_per_worker: dict[str, Amount] = {}
    labels: dict[str, str] = Field({}, description="of the nodes that workers may run on")
