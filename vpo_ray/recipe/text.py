"""Recipe sections of the text side: the policy, its candidates and the judge."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vpo_ray.recipe.base import Pool, Positive, Section, Temperature


class Policy(Section):
    """The LLM to train: a Hugging Face folder or hub id, and the task prompt folded into it.

    `task_prompt` is a text file with one `{query}` slot; `builtin:policy` is the package's own
    wording.
    """

    model: str
    revision: str | None = None
    task_prompt: str = "builtin:policy"
    trust_remote_code: bool = False


class Engine(Section):
    """vLLM settings of a chat pool. `engine_kwargs` go to vLLM as they are; `env` to its process."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: Positive | None = None
    tensor_parallel_size: Positive = 1
    max_num_seqs: Positive = 256
    batch_size: Positive = 16
    max_concurrent_batches: Positive = 32
    engine_kwargs: dict[str, Any] = {}
    env: dict[str, str] = {}


class Sample(Section):
    """K candidate prompts per query from the policy."""

    k: Positive
    temperature: Temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    max_tokens: Positive
    engine: Engine = Engine()
    pool: Pool = Pool()


class Judge(Section):
    """The LLM that critiques every candidate, refines the misaligned ones and judges again."""

    model: str
    revision: str | None = None
    backend: Literal["vllm"] = "vllm"
    trust_remote_code: bool = False
    critique_prompt: str = "builtin:critique"
    refine_prompt: str = "builtin:refine"
    temperature: Temperature = 0.0
    max_tokens: Positive = 1024
    critique_max_chars: Positive = 1200
    prompt_max_chars: Positive = 2000
    word_limit: Positive = 200
    engine: Engine = Engine()
    pool: Pool = Pool()
