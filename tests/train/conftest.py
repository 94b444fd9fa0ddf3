"""Training in this process: a process group of one, and workers on the tiny policy."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from train_data import TASK_PROMPT

from vpo_ray.recipe import Training
from vpo_ray.records import Row


@pytest.fixture(scope="package")
def process_group() -> Iterator[None]:
    """This process as the only worker of a gloo group."""
    import torch.distributed as dist

    from vpo_ray.train.zero import prepare_process

    accelerator = os.environ.get("DS_ACCELERATOR")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    prepare_process(use_gpu=False)
    yield
    dist.destroy_process_group()
    if accelerator is None:
        del os.environ["DS_ACCELERATOR"]


@pytest.fixture
def make_worker(
    process_group: None, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Makes the worker that the loop runs on rank 0 of 1, with its reference computed."""
    import torch

    # ZeRO-3 puts a function of its own in this place, for good: it rounds otherwise, and knows no
    # quantised weights. A worker has its process to itself; here the next test would have it.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)

    from vpo_ray.engines.chat.tokenizer import load_tokenizer
    from vpo_ray.train import zero
    from vpo_ray.train.examples import end_of_turn, tokenise
    from vpo_ray.train.images import ImagePrompts
    from vpo_ray.train.phase import Job
    from vpo_ray.train.policy import PackedPolicy, autocasts
    from vpo_ray.train.vision import ImageFeatures
    from vpo_ray.train.worker import Worker

    def make(
        phase: str,
        rows: list[Row],
        chosen: Training,
        seed: int = 0,
        held_out: int = 0,
        model: str | Path = tiny_models / "policy",
        images: str | None = None,
    ) -> Worker:
        model = str(model)
        torch.manual_seed(seed)
        tokenizer = load_tokenizer(model, TASK_PROMPT)
        names = [row["image"] for row in rows if images is not None and row.get("image") is not None]
        prompts = ImagePrompts(model, tokenizer, str(images), names) if names else None
        shown = prompts and prompts.prompt
        examples, _ = tokenise(phase, rows, tokenizer, TASK_PROMPT, chosen.max_length, shown)
        job = Job(
            phase=phase,
            settings=chosen,
            model=model,
            task_prompt=TASK_PROMPT,
            examples=examples[: len(examples) - held_out],
            held_out=examples[len(examples) - held_out :],
            tokenizer=tokenizer,
            end=end_of_turn(tokenizer, TASK_PROMPT),
            out=str(tmp_path / "out"),
            run_uri=str(tmp_path),
            seed=seed,
            fingerprint="",
            id="test",
            facts={},
            images=images,
            shown=prompts and prompts.images,
        )
        config = zero.deepspeed_config(chosen, 1)
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_RANK", "0")
            loaded = zero.load_model(model, chosen, config, None, False)
            device = torch.device("cpu")
            features = prompts and ImageFeatures(prompts.images, loaded, device)
            policy = PackedPolicy(loaded, autocasts(chosen.autocast, device), features)
            worker = Worker(job, zero.start_engine(policy, chosen, config), 0, 1, device)
        if phase != "sft":
            worker.reference = worker.compute_reference("test")
        if phase == "rl":
            worker.sampled = worker.reference
        return worker

    return make
