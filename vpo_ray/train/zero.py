"""DeepSpeed: its configuration from the recipe, the policy under it, and its checkpoints.

The recipe's own JSON (`deepspeed:` of a phase) is merged in. A key that the recipe already decides is
refused by name, so that two places never disagree silently.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vpo_ray.files.weight_files import folder_problems
from vpo_ray.recipe import Training
from vpo_ray.train.examples import TrainError
from vpo_ray.train.lora import attach

# Keys of the configuration that recipe keys decide.
_DECIDED = {
    "train_batch_size": "global_batch and workers",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "global_batch, workers and micro_batch",
    "gradient_clipping": "clip_grad_norm",
    "bf16.enabled": "dtype",
    "fp16.enabled": "dtype",
    "optimizer.params.lr": "lr",
    "optimizer.params.betas": "adam_betas",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.type": "schedule",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload.optimizer",
    "zero_optimization.offload_param.device": "offload.parameters",
}


def deepspeed_config(settings: Training, workers: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`.

    DeepSpeed gets a batch size of one per worker: the training loop decides on a step's packs and their
    weights, since packs hold different numbers of tokens.

    Raises:
        TrainError: `settings.deepspeed` contradicts the recipe.
    """
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    for name, device in (
        ("offload_optimizer", settings.offload.optimizer),
        ("offload_param", settings.offload.parameters),
    ):
        if device != "none":
            path = {"nvme_path": settings.offload.nvme_path} if device == "nvme" else {}
            zero[name] = {"device": device, "pin_memory": settings.use_gpu, **path}
    ours: dict[str, Any] = {
        "train_batch_size": workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip_grad_norm,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    if "optimizer" in settings.deepspeed:
        params = {
            "lr": settings.lr,
            "betas": list(settings.adam_betas),
            "weight_decay": settings.weight_decay,
        }
        ours["optimizer"] = {"params": params}
    return _merge(ours, settings.deepspeed, "")


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Replace `auto`, as Hugging Face's integration does: by what the recipe says, or DeepSpeed's default."""
    merged = dict(ours)
    for name, value in theirs.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            below = ours.get(name, {})
            merged[name] = _merge(below if isinstance(below, Mapping) else {}, value, f"{key}.")
        elif value == "auto":
            continue
        elif key not in _DECIDED:
            merged[name] = value
        elif value != ours.get(name):
            raise TrainError(
                f"deepspeed.{key} is {value!r}, but it follows from {_DECIDED[key]} of the recipe"
                + (f" ({ours[name]!r})" if name in ours else "")
                + "; remove it from the deepspeed section"
            )
    return merged


def prepare_process(use_gpu: bool) -> None:
    """Set what DeepSpeed reads when it is imported or first used, and make it communicate over the process
    group of Ray Train."""
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # torch warns on every rank, several times, of renamed functions that DeepSpeed calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import torch

    # Checksums take a quarter of a checkpoint's time, and `torch.load` ignores them.
    torch.serialization.set_crc32_options(False)

    # Its all-reduce through shared memory is compiled on first use, which needs g++ and ninja on
    # every machine; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if use_gpu else "gloo", auto_mpi_discovery=False)


def load_model(
    model: str, settings: Training, config: dict[str, Any], revision: str | None, trust: bool
) -> Any:
    """The policy, with packed attention, and with adapters where the recipe has `lora`.

    Under ZeRO-3 its parameters are partitioned as they load, so that no worker ever holds a full copy.

    What a vision-language model sees with is set apart (see `vision`).

    Raises:
        TrainError: the folder's files are not whole, it is not a causal language model, or cannot take these
            adapters.
    """
    import torch
    from transformers import AutoConfig
    from transformers.integrations import HfDeepSpeedConfig

    from vpo_ray.train import attention, vision

    if Path(model).is_dir() and (problems := list(folder_problems(Path(model), weights=False))):
        raise TrainError("; ".join(problems))
    attention.register_attention()
    keep = HfDeepSpeedConfig(config) if settings.zero_stage == 3 else None
    given: dict[str, Any] = {"revision": revision, "trust_remote_code": trust}
    try:
        kind = AutoConfig.from_pretrained(model, **given)
        loaded, info = vision.auto_class(kind).from_pretrained(
            model,
            **given,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=vision.attention_of(kind, attention.NAME),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
        )
    except ValueError as error:
        raise TrainError(f"{model} is not a causal language model: {error}") from error
    finally:
        del keep
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise TrainError(
            f"{model}: the weights are not those of its config.json: {len(wrong)} are missing or of another "
            f"shape, such as {wrong[0]}; training would start from noise"
        )
    vision.freeze_vision(loaded)
    if settings.activation_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return loaded if settings.lora is None else attach(loaded, settings.lora)


def start_engine(policy: Any, settings: Training, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine with AdamW (or the optimizer that the deepspeed section names)."""
    import deepspeed
    import torch

    # Weight decay is for matrices; under ZeRO-3 a parameter has its full shape in `ds_shape`.
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
        # Offloaded state is updated on the CPU, for which DeepSpeed compiles an optimizer of its own.
        offloaded = settings.offload.optimizer != "none"
        adam = _cpu_adam() if offloaded else partial(torch.optim.AdamW, fused=True)
        optimizer = adam(parameters, lr=settings.lr, betas=settings.adam_betas, eps=1e-8)
    if is_plain(settings):
        config = {**config, "gradient_clipping": 0.0}  # see `step`
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=optimizer,
        model_parameters=parameters,
        config=config,
        dist_init_required=False,
    )
    if is_plain(settings) and engine.world_size == 1:
        engine.enable_backward_allreduce = False  # alone it would copy all gradients, and copy them back
    return engine


def is_plain(settings: Training) -> bool:
    """Whether the optimizer updates the weights itself: without ZeRO, in float32."""
    return settings.zero_stage == 0 and settings.dtype == "float32"


def _cpu_adam() -> Any:
    """DeepSpeed's AdamW for the CPU; it is compiled at first use.

    Raises:
        TrainError: it cannot be compiled here.
    """
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # The ninja of our own environment, where there is no other.
    here = str(Path(sys.executable).parent)
    if here not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + here
    try:
        deepspeed.ops.op_builder.CPUAdamBuilder().load(verbose=False)
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        raise TrainError(
            f"offload.optimizer needs DeepSpeed's CPU Adam, which does not compile here: {error}. It needs "
            "g++ and ninja on every node; or give the deepspeed section an optimizer"
        ) from error
    return DeepSpeedCPUAdam


def release(engine: Any) -> None:
    """Free an engine and its memory on the accelerator."""
    import gc

    import torch

    engine.destroy()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def full_weights(engine: Any, rank: int, trained_only: bool = False) -> dict[str, Any]:
    """The policy's weights (or the trained ones) by name, on rank 0's CPU; empty on other ranks.

    Every rank must call this. Parameters are gathered one by one, so that no accelerator holds all.
    """
    import deepspeed

    from vpo_ray.train.vision import frozen_weights

    gathered = {}
    for name, tensor in engine.module.model.state_dict(keep_vars=True).items():
        if trained_only and not tensor.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if rank == 0:
                gathered[name] = tensor.detach().cpu().clone()
    if rank == 0 and not trained_only:
        gathered |= {name: part.cpu() for name, part in frozen_weights(engine.module.model).items()}
    return gathered


def bytes_of(engine: Any, trained_only: bool = False) -> int:
    """Bytes of the policy's weights (or the trained ones) over all workers."""
    from vpo_ray.train.vision import frozen_weights

    frozen = 0 if trained_only else sum(part.nbytes for part in frozen_weights(engine.module.model).values())
    return frozen + sum(
        getattr(p, "ds_numel", p.numel()) * p.element_size()
        for p in engine.module.parameters()
        if p.requires_grad or not trained_only
    )


def bit_sums(engine: Any) -> Any:
    """A checksum of every trained parameter, the sum of its bits read as integers: int64, the same on every
    rank. Every rank must call this."""
    import deepspeed
    import torch

    sums = []
    for tensor in engine.module.parameters():
        if not tensor.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            bits = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
            sums.append(tensor.detach().view(bits).sum(dtype=torch.int64))
    return torch.stack(sums).cpu()


def step(engine: Any, settings: Training) -> float:
    """Clip, update the weights, clear the gradients. Returns the global gradient norm before clipping."""
    import torch

    if not is_plain(settings):
        engine.step()
        return float(engine.get_global_grad_norm())
    # DeepSpeed would compute the norm for itself, and not tell: it is computed once, here.
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if settings.clip_grad_norm and norm > settings.clip_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_grad_norm, norm)
    engine.step()
    return norm.item()
