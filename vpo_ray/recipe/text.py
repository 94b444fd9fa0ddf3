"""Recipe sections of the text side: the policy, its candidates and the judge."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from vpo_ray.recipe.base import (
    Place,
    Pool,
    Positive,
    Section,
    Source,
    Temperature,
    refuse_unused,
    require_keys,
)
from vpo_ray.recipe.endpoint import Endpoint, refuse_keys
from vpo_ray.recipe.plugins import Kind, Modelled

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
                       "chat_template", "tokenize", "return_dict"})  # fmt: skip


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if not name.isidentifier() or name in _RESERVED:
            raise ValueError(f"{name!r} is no argument that a chat template is given")
    return given


# Arguments of a model's chat template, such as `enable_thinking: false`; part of what is computed.
TemplateArguments = Annotated[dict[str, Any], AfterValidator(_arguments)]


# What a model is shown of the images of queries (queries.image_column).
Images = Literal["show", "ignore"]


class Policy(Section):
    """The LLM to train: a Hugging Face folder or hub id, and the task prompt folded into it.

    `task_prompt` is a text file with one `{query}` slot; `builtin:policy` is the package's own
    wording. `chat_template_kwargs` are arguments of the model's chat template, such as
    `enable_thinking: false`; they are written into it, and travel with every checkpoint.
    """

    model: Source
    revision: str | None = None
    task_prompt: Source = "builtin:policy"
    chat_template_kwargs: TemplateArguments = {}
    trust_remote_code: bool = False
    images: Images = Field("show", description="of queries; ignore: it reads the text alone")


class Engine(Section):
    """vLLM settings of a chat pool. `engine_kwargs` go to vLLM as they are; `env` to its process."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: Positive | None = None
    tensor_parallel_size: Positive = 1
    max_num_seqs: Positive = 256
    batch_size: Positive = 16
    max_concurrent_batches: Positive = 32
    engine_kwargs: dict[str, Any] = {}
    env: dict[str, Place] = {}

    @property
    def pieces(self) -> int:
        """Workers of one engine, each of which has what the pool reserves."""
        return int(self.tensor_parallel_size * self.engine_kwargs.get("pipeline_parallel_size", 1))

    def executor(self) -> dict[str, str]:
        """The engine argument that leaves a lone worker on a CPU in the engine's own process, where
        its threads are not to be bound to cores. Binding is what vLLM starts a second process for,
        and the two wait for each other by spinning."""
        if self.pieces > 1 or self.env.get("VLLM_CPU_OMP_THREADS_BIND") != "nobind":
            return {}
        return {"distributed_executor_backend": "vpo_ray.engines.chat.cpu_executor.CpuExecutor"}


class Sample(Section):
    """K candidate prompts per query from the policy."""

    k: Positive
    temperature: Temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    max_tokens: Positive
    engine: Engine = Engine()
    pool: Pool = Pool()


class ChatModel(Modelled):
    """An LLM that answers chats: vLLM on the cluster, an OpenAI-compatible endpoint, or another's engine
    (see `Modelled`).

    With `backend: openai` the model is one of the endpoint's; the engine's settings of vLLM wait for
    `backend: vllm`. `chat_template_kwargs` are arguments of the model's chat
    template, such as `enable_thinking: false`; an endpoint is sent them with every request.
    """

    group: ClassVar[str] = "vpo_ray.chat"
    known: ClassVar[tuple[str, ...]] = ("vllm", "openai")
    key: ClassVar[str] = "backend"

    model: Source = Field("", description="a plugin may do without")
    revision: str | None = None
    chat_template_kwargs: TemplateArguments = {}
    backend: Kind = "vllm"
    endpoint: Endpoint = Endpoint()
    trust_remote_code: bool = False
    images: Images = Field("show", description="of queries; ignore: it reads the text alone")
    engine: Engine = Engine()
    pool: Pool = Pool()

    @model_validator(mode="after")
    def _all_used(self) -> ChatModel:
        if self.is_plugin:
            return self
        require_keys(self, "model")
        refuse_unused(self, "options", f"with backend: {self.backend}")
        refuse_keys(self.endpoint, ["logprobs"], "a judge or drafts")
        if self.backend == "vllm":
            refuse_unused(self, "endpoint", "with backend: vllm")
        else:
            refuse_unused(self, "revision trust_remote_code", "with backend: openai")
        return self


class Judge(ChatModel):
    """The LLM that critiques every candidate, refines the misaligned ones and judges again.

    Without `refine` it gives verdicts only: no text pairs come of them.
    """

    refine: bool = True
    critique_prompt: Source = "builtin:critique"
    refine_prompt: Source = "builtin:refine"
    temperature: Temperature = 0.0
    max_tokens: Positive = 1024
    critique_max_chars: Positive = 1200
    prompt_max_chars: Positive = 2000
    max_details: Positive = Field(8, description="missing and added details named, of each at most")
    detail_max_chars: Positive = 160
    word_limit: Positive = 200

    @model_validator(mode="after")
    def _refines(self) -> Judge:
        if not self.refine:
            refuse_unused(self, "refine_prompt", "with refine: false")
        return self

    def without_refining(self) -> Judge:
        """The same judge for verdicts only."""
        return self.model_copy(update={"refine": False, "refine_prompt": "builtin:refine"})


class Draft(Section):
    """SFT data: a strong LLM writes a prompt for every query of the sft split, shown some examples.

    The judge's prompts and limits check and repair what it wrote. `llm` unset is the judge's model.
    """

    llm: ChatModel | None = None
    examples: Source = Field(description="rows as in queries.path, with `query` and `prompt`")
    shots: Positive = Field(3, description="examples shown with a query, chosen by its id")
    prompt: Source = "builtin:draft"
    temperature: Temperature = 0.7
    max_tokens: Positive = 1024
