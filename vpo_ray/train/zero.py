"""DeepSpeed: its configuration from the recipe, the policy under it, and its checkpoints.

The recipe's own JSON (`deepspeed:` of a phase) is merged in; a key that the recipe already decides
is refused by name, so that two places never disagree in silence.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from vpo_ray.recipe import Train
from vpo_ray.train.examples import TrainError

# Keys of the configuration that follow from recipe keys.
_DECIDED = {
    "train_batch_size": "global_batch and workers",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "global_batch, workers and micro_batch",
    "gradient_clipping": "clip_grad_norm",
    "bf16.enabled": "dtype",
    "fp16.enabled": "dtype",
    "scheduler.type": "schedule",
    "zero_optimization.stage": "zero_stage",
}


def deepspeed_config(settings: Train, workers: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`.

    DeepSpeed is told of batches of one per worker: a step's packs, their number and the weight of
    each are the loop's business, since packs hold different numbers of tokens.

    Raises:
        TrainError: `settings.deepspeed` decides what the recipe decides, otherwise.
    """
    ours: dict[str, Any] = {
        "train_batch_size": workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip_grad_norm,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    merged = _merge(ours, settings.deepspeed, "")
    return merged


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in theirs.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            below = ours.get(name, {})
            merged[name] = _merge(below if isinstance(below, Mapping) else {}, value, f"{key}.")
        elif key not in _DECIDED:
            merged[name] = value
        elif value not in ("auto", ours.get(name)):
            raise TrainError(
                f"deepspeed.{key} is {value!r}, but it follows from {_DECIDED[key]} of the recipe"
                + (f" ({ours[name]!r})" if name in ours else "")
                + "; remove it from the deepspeed section"
            )
    return merged


def prepare_process(use_gpu: bool) -> None:
    """Settings that DeepSpeed reads when it is imported or first used, and its communication over
    the process group that Ray Train has set up."""
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # torch tells every rank, several times, that functions DeepSpeed calls have new names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    # Its all-reduce through shared memory is compiled on first use, which needs g++ and ninja on
    # every machine; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if use_gpu else "gloo", auto_mpi_discovery=False)


def load_model(model: str, settings: Train, config: dict[str, Any], revision: str | None, trust: bool) -> Any:
    """The policy, with packed attention. Under ZeRO-3 its parameters are partitioned as they load,
    so that no worker ever holds a full copy."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from vpo_ray.train.policy import ATTENTION, register_attention

    register_attention()
    keep = HfDeepSpeedConfig(config) if settings.zero_stage == 3 else None
    loaded = AutoModelForCausalLM.from_pretrained(
        model,
        revision=revision,
        trust_remote_code=trust,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=ATTENTION,
    )
    del keep
    if settings.activation_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return loaded


def start_engine(policy: Any, settings: Train, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine with AdamW (or the optimizer that the deepspeed section names)."""
    import deepspeed
    import torch

    # Weight decay is for matrices; under ZeRO-3 a partitioned parameter tells its shape itself.
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in policy.parameters():
        if parameter.requires_grad:
            groups[len(getattr(parameter, "ds_shape", parameter.shape)) > 1].append(parameter)
    parameters = [
        {"params": group, "weight_decay": settings.weight_decay if is_matrix else 0.0}
        for is_matrix, group in groups.items()
        if group
    ]
    optimizer = None
    if "optimizer" not in config:
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.adam_betas, eps=1e-8)
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=optimizer,
        model_parameters=parameters,
        config=config,
        dist_init_required=False,
    )
    return engine


def full_weights(engine: Any, rank: int) -> dict[str, Any]:
    """The policy's weights by name, on rank 0's CPU; empty elsewhere. Every rank must call this.

    Parameters are gathered one after the other, so that no accelerator holds them all.
    """
    import deepspeed

    gathered = {}
    for name, tensor in engine.module.model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if rank == 0:
                gathered[name] = tensor.detach().cpu().clone()
    return gathered


def step(engine: Any) -> float:
    """Clip, update the weights, clear the gradients; the global gradient norm before clipping."""
    import torch

    plain = engine.optimizer is engine.basic_optimizer
    if plain:  # without ZeRO in float32, DeepSpeed clips but keeps no norm
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
    engine.step()
    return norm if plain else float(engine.get_global_grad_norm())
