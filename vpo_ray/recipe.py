"""A recipe: one YAML file that says which models, which data and how many resources a run takes.

The tree below is the whole configuration of `vpo`. It imports neither torch nor Ray, so that a
recipe is checked in milliseconds (`vpo plan recipe.yaml`). Unknown keys are refused, every error
names the key, and `--set render.steps=30` overrides a key from the command line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vpo_ray.recipe_file import RecipeError, read_tree, set_key

# Keys that change how a run is executed but not what it computes. They may differ between two
# runs of one run directory; every other key is part of the fingerprint.
OPERATIONAL = frozenset({
    "out", "pool", "limits", "serve", "env", "device", "engine_kwargs", "workers", "use_gpu",
    "resources_per_worker", "max_failures", "batch_size", "max_num_seqs", "max_concurrent_batches",
    "tensor_parallel_size", "vae_slicing", "offload", "time_limit_s", "store",
})  # fmt: skip

_VIDEO_PRESETS = Path(__file__).parent / "data" / "video_presets.yaml"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _size(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


class Pool(Section):
    """An actor pool: how many replicas, and what each reserves of the cluster."""

    size: Annotated[tuple[Positive, Positive], BeforeValidator(_size)] = (1, 1)
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    accelerator_type: str | None = None
    resources: dict[str, float] = {}

    @model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.size[0] > self.size[1]:
            raise ValueError(f"size {list(self.size)}: write [min, max] with min <= max, or one number")
        return self


class Splits(Section):
    """Shares of the curated queries; they are normalised to a sum of one."""

    sft: Annotated[float, Field(ge=0)] = 0
    dpo: Annotated[float, Field(ge=0)] = 1
    eval: Annotated[float, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _some(self) -> Splits:
        if self.sft + self.dpo + self.eval <= 0:
            raise ValueError("every share is 0: give at least one of sft, dpo, eval a share")
        return self


class Queries(Section):
    """Where user queries come from, and which are dropped (each with a counted reason)."""

    path: str | list[str]
    column: str = "query"
    limit: Positive | None = None
    min_chars: Positive = 1
    max_chars: Positive = 4000
    splits: Splits = Splits()


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


@cache
def video_presets() -> dict[str, dict[str, Any]]:
    """Published video models by name: `settings` of the render section, `sources` of these numbers,
    and `seconds` a video on some GPUs where they are published."""
    presets: dict[str, dict[str, Any]] = yaml.safe_load(_VIDEO_PRESETS.read_text("utf-8"))
    return presets


class Render(Section):
    """The team's own text-to-video model, any diffusers pipeline.

    `preset` fills the keys that are not given with a published model's own recommended settings
    (`vpo_ray/data/video_presets.yaml`). `cache=first_block` needs `batch_size=1`.
    """

    preset: str | None = None
    model: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    vae_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    scheduler: str | None = Field(None, description="diffusers scheduler class; the model's own when unset")
    scheduler_options: dict[str, Any] = Field({}, description="e.g. timestep_spacing, flow_shift")
    steps: Positive = 50
    guidance: Annotated[float, Field(ge=0)] = 6.0
    negative_prompt: str | None = None
    frames: Positive = 49
    fps: Positive = 8
    height: Positive = 480
    width: Positive = 720
    call_options: dict[str, Any] = Field({}, description="further arguments of the pipeline's call")
    max_text_tokens: Positive | None = Field(None, description="T5 length; the pipeline's default when unset")
    long_prompts: Literal["truncate", "error"] = "truncate"
    crf: Annotated[int, Field(ge=0, le=51)] = 17
    vae_tiling: bool = False
    vae_slicing: bool = False
    compile: bool = False
    attention: str | None = Field(None, description="diffusers attention backend, e.g. native, flash, sage")
    cache: Literal["first_block", "faster", "pyramid", "taylorseer"] | None = None
    cache_options: dict[str, Any] = {}
    offload: Literal["none", "model", "sequential"] = "none"
    batch_size: Positive = 1
    time_limit_s: Annotated[float, Field(gt=0)] = 1800
    store: str | None = Field(None, description="folder or URI of the video store; <out>/videos when unset")
    device: str = "auto"
    trust_remote_code: bool = False
    pool: Pool = Pool()

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("preset"), str):
            return given
        presets = video_presets()
        if given["preset"] not in presets:
            raise ValueError(f"preset {given['preset']!r} is not known; there are {', '.join(presets)}")
        return {**presets[given["preset"]]["settings"], **given}


class Checklist(Section):
    """Yes/no questions about a video, with weights and dimensions.

    Either `file`, one YAML with a list `questions` of {question, weight, dimension}, or
    VisionReward's published files: `questions` (one per line) and `weights` (a JSON list), with
    `dimensions` mapping a name to 1-based question ranges such as "1-4, 36-37".
    """

    file: str | None = None
    questions: str | None = None
    weights: str | None = None
    dimensions: dict[str, str] = {}
    strip_newlines: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> Checklist:
        if (self.file is None) == (self.questions is None):
            raise ValueError("give either `file`, or `questions` with `weights`")
        if self.questions is not None and self.weights is None:
            raise ValueError("`questions` needs `weights`, a JSON list with one number per question")
        return self

    def files(self) -> dict[str, str | None]:
        return {"file": self.file, "questions": self.questions, "weights": self.weights}


class Endpoint(Section):
    """An OpenAI-compatible endpoint. The key is read from the environment, never from a recipe."""

    base_url: Annotated[str | None, Field(description="the openai client's default when unset")] = None
    api_key_env: Annotated[str | None, Field(description="variable with the key; null for none")] = (
        "OPENAI_API_KEY"
    )
    concurrency: Positive = 16
    timeout_s: Annotated[float, Field(gt=0)] = 120
    retries: Annotated[int, Field(ge=0)] = 5
    logprobs: bool = True


class Reward(Section):
    """The reward model. `convention`: sum01 adds the weights of the questions answered yes (VPO);
    mean_pm1 is VisionReward's repository script, sum(w * (+1|-1)) / n. With `kind: openai` the
    model is one of the endpoint's, and dtype, attention, template and device are not used."""

    kind: Literal["visionreward", "openai"] = "visionreward"
    model: str
    endpoint: Endpoint = Endpoint()
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attention: Literal["sdpa", "eager"] = "sdpa"
    frame_strategy: Literal["chat", "base"] | float = Field(
        "chat",
        description="chat: 1 fps, at most 24 frames; base: 24 uniform; a number: that many frames a second",
    )
    template: Literal["chat", "vqa", "base"] = "chat"
    rule: Literal["argmax", "margin"] = "argmax"
    yes_tokens: list[str] = Field(
        ["yes"], min_length=1, description="quote them: YAML reads a bare yes as true"
    )
    no_tokens: list[str] = Field(["no"], min_length=1)
    convention: Literal["sum01", "mean_pm1"] = "sum01"
    checklist: Checklist
    batch_size: Positive = 1
    device: str = "auto"
    pool: Pool = Pool()


class Pair(Section):
    """How preference pairs are chosen. The defaults are VPO's (facts: paper 3.3 and its code)."""

    margin: Annotated[float, Field(ge=0)] = 0.5
    dominance: Literal["none", "question", "dimension"] = "question"
    choice: Literal["first", "best"] = "first"
    video_per_query: Annotated[int, Field(ge=0)] = 1
    text_per_query: Annotated[int, Field(ge=0)] = 1
    precedence: Literal["text", "video", "both"] = "text"


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
    resources_per_worker: dict[str, float] = {}


class Serve(Section):
    """The endpoint of the trained policy."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    model_name: str = "vpo"
    temperature: Temperature = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 1024
    max_query_chars: Positive = 4000
    max_n: Positive = 8
    engine: Engine = Engine()
    pool: Pool = Pool()


class Limits(Section):
    """When a run gives up. Errors are counted over finished candidates."""

    max_error_share: Fraction = 0.5
    min_rows: Positive = 20
    tries: Positive = 2


class Recipe(Section):
    """The whole recipe. `load` reads one, `fingerprint` names what it computes."""

    name: str
    seed: int = 0
    out: str
    queries: Queries
    policy: Policy
    sft: Train | None = None
    sample: Sample
    judge: Judge
    render: Render
    reward: Reward
    pair: Pair = Pair()
    dpo: Train | None = None
    serve: Serve = Serve()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _trains_what_it_has(self) -> Recipe:
        if self.sft is not None and self.sft.data is None:
            raise ValueError(
                "sft.data is missing: name a JSONL or Parquet file with `query` and `prompt`, "
                "or remove the sft section"
            )
        return self

    def dump(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def fingerprint(self, *sections: str) -> str:
        """16 hex digits over every key that changes results (of `sections`, or of all).

        Keys at their defaults do not count, so that a key which a later version adds leaves the
        fingerprints of older recipes as they are.
        """
        given = computed(self.model_dump(mode="json", exclude_defaults=True))
        chosen = {k: v for k, v in given.items() if not sections or k.split(".")[0] in sections}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from YAML and apply `key.path=value` overrides (values are YAML too).

    Raises:
        RecipeError: for a file that is missing or no YAML mapping, an unknown key, or a bad value.
    """
    tree = read_tree(path)
    for item in overrides:
        set_key(tree, item)
    return parse(tree, str(path))


def parse(tree: Mapping[str, Any], where: str) -> Recipe:
    """Validate a tree; `where` names it in errors. Raises RecipeError with one line per problem."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {_explain(e)}" for e in error.errors()]
        raise RecipeError(
            f"{where}: {len(lines)} problem{'s'[: len(lines) > 1]}\n" + "\n".join(lines)
        ) from None


def load_serve(path: str | None, overrides: Iterable[str]) -> Serve:
    """The `serve` section of a recipe, or its defaults, with `serve.key=value` overrides."""
    if path is not None:
        return load(path, overrides).serve
    tree: dict[str, Any] = {"serve": {}}
    for item in overrides:
        set_key(tree, item)
    try:
        return Serve.model_validate(tree["serve"])
    except ValidationError as error:
        raise RecipeError("\n".join(f"serve.{_explain(e)}" for e in error.errors())) from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys that change results and differ between two dumped recipes, as `key: old -> new`."""
    a, b = computed(old), computed(new)
    return [
        f"{k}: {a.get(k, 'absent')!r} -> {b.get(k, 'absent')!r}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]


def computed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a dumped recipe, by dotted key, without operational ones."""
    return dict(_leaves(tree, ()))


def locate(name: str) -> str:
    """The absolute path of a local folder or file, or the hub id or URI as it is."""
    return str(Path(name).resolve()) if "://" not in name and Path(name).exists() else name


def _leaves(tree: Mapping[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if key in OPERATIONAL:
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield ".".join((*prefix, key)), value


def _explain(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "recipe"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], _keys_at(location[:-1]), n=1)
        hint = (
            f"; did you mean `{close[0]}`?"
            if close
            else f"; known here: {', '.join(_keys_at(location[:-1]))}"
        )
        return f"{key}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{key}: missing; add it to the recipe or give --set {key}=..."
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(error.get("input"))
    return f"{key}: {message}" + (f" (got {shown[:80]})" if not isinstance(error.get("input"), dict) else "")


def _keys_at(location: list[str]) -> list[str]:
    model: Any = Recipe
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        args = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((a for a in args if isinstance(a, type) and issubclass(a, Section)), None)
    return list(getattr(model, "model_fields", {}))
