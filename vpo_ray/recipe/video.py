"""Recipe sections of the video side: the video model, the reward and the pairing rule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from vpo_ray.recipe.base import (
    Place,
    Pool,
    Positive,
    Section,
    Source,
    locate,
    refuse_unused,
    require_keys,
    sources,
)
from vpo_ray.recipe.endpoint import Endpoint, VideoEndpoint, refuse_keys
from vpo_ray.recipe.formula import pair_presets
from vpo_ray.recipe.plugins import Kind, Modelled, find_usable
from vpo_ray.recipe.preview import Preview

_VIDEO_PRESETS = Path(__file__).parents[1] / "data" / "video_presets.yaml"


@cache
def video_presets() -> dict[str, dict[str, Any]]:
    """Published video models by name: `settings` of the render section, `sources` of these numbers,
    and `seconds` a video on some GPUs where they are published."""
    presets: dict[str, dict[str, Any]] = yaml.safe_load(_VIDEO_PRESETS.read_text("utf-8"))
    return presets


class Lora(Section):
    """LoRA weights of the video model: a safetensors file, a folder or hub id with one."""

    path: Source
    weight_name: str | None = Field(None, description="the file, where a folder or hub id has several")
    revision: str | None = None
    scale: float = 1.0


class Render(Modelled):
    """The team's own text-to-video model: any diffusers pipeline, a service of video jobs, or another's
    (see `Modelled`).

    `preset` fills the keys that are not given with a published model's own recommended settings
    (`vpo_ray/data/video_presets.yaml`). `cache=first_block` needs `batch_size=1`. With `kind: openai` the
    model is one of `endpoint`, and what a video is made with is said in `endpoint.request`.
    """

    group: ClassVar[str] = "vpo_ray.video"
    known: ClassVar[tuple[str, ...]] = ("diffusers", "openai")

    kind: Kind = "diffusers"
    preset: str | None = None
    model: Source = Field("", description="a plugin may do without")
    version: Annotated[
        Annotated[str, BeforeValidator(str, json_schema_input_type=str | float)] | None,
        Field(description="of a service's model; another one renders all videos anew"),
    ] = None
    endpoint: VideoEndpoint = VideoEndpoint()
    revision: str | None = None
    lora: Lora | None = None
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
    quantize: Literal["int8_weight_only", "int8_dynamic", "float8_weight_only", "float8_dynamic"] | None = (
        Field(None, description="torchao, on the linear layers of what denoises")
    )
    attention: str | None = Field(None, description="diffusers attention backend, e.g. native, flash, sage")
    cache: Literal["first_block", "faster", "pyramid", "taylorseer"] | None = None
    cache_options: dict[str, Any] = {}
    offload: Literal["none", "model", "sequential"] = "none"
    context_parallel: Positive = Field(
        1, description="GPUs of one replica that compute each video together (pool.num_gpus says as many)"
    )
    strategy: Literal["all", "adaptive"] = Field(
        "all", description="adaptive: no more videos of a query than its pair takes, in rounds"
    )
    preview: Preview | None = None
    batch_size: Positive = 1
    time_limit_s: Annotated[float, Field(gt=0)] = 1800
    store: Place | None = Field(None, description="folder or URI of the video store; <out>/videos when unset")
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

    def located(self) -> Render:
        """The settings with absolute paths, which hold on every node that mounts them."""
        if self.kind == "openai":
            return self
        lora = self.lora and self.lora.model_copy(update={"path": locate(self.lora.path)})
        return self.model_copy(update={"model": locate(self.model), "lora": lora})

    @model_validator(mode="after")
    def _all_used(self) -> Render:
        if not self.is_plugin:
            require_keys(self, "model")
            refuse_unused(self, "options", f"with kind: {self.kind}")
        if self.kind == "openai":
            local = " ".join(name for name in type(self).model_fields if name not in _OF_SERVICES)
            refuse_unused(
                self, local, "with kind: openai: say it in endpoint.request, as the service names it"
            )
        elif not self.is_plugin:
            refuse_unused(self, "version endpoint", f"with kind: {self.kind}")
        return self

    @model_validator(mode="after")
    def _previews_are_cheaper(self) -> Render:
        preview = self.preview
        if preview is None:
            return self
        if self.strategy == "adaptive":
            raise ValueError(
                "preview does not go together with strategy: adaptive: both say which candidates are worth a "
                "video. Write strategy: all, or leave preview out"
            )
        if self.kind == "openai":
            if local := ", ".join(f"preview.{name}" for name in preview.looks()):
                raise ValueError(f"{local}: no effect with kind: openai, whose words are in preview.request")
            if {**self.endpoint.request, **preview.request} == self.endpoint.request:
                raise ValueError("preview.request says nothing that differs from endpoint.request")
            return self
        if preview.request:
            raise ValueError(f"preview.request has no effect with kind: {self.kind}")
        looks = preview.looks()
        if all(value == getattr(self, name) for name, value in looks.items()):
            raise ValueError("preview says nothing that differs: give it fewer steps or frames, or a size")
        for name in ("steps", "frames", "height", "width"):
            if looks.get(name, 0) > getattr(self, name):
                raise ValueError(
                    f"preview.{name}: {looks[name]} is more than {name}: {getattr(self, name)} of the full "
                    "render, and a preview is to be cheaper"
                )
        return self

    def previewed(self) -> Render:
        """The settings of previews. Raises ValueError where there are none."""
        if self.preview is None:
            raise ValueError("render.preview is not given")
        changed: dict[str, Any] = {**self.preview.looks(), "preview": None}
        if self.kind == "openai":
            request = {**self.endpoint.request, **self.preview.request}
            changed["endpoint"] = self.endpoint.model_copy(update={"request": request})
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _one_gpu_a_rank(self) -> Render:
        if self.context_parallel == 1:
            return self
        if self.device != "cpu" and self.pool.num_gpus != self.context_parallel:
            raise ValueError(
                f"context_parallel={self.context_parallel} takes as many GPUs a replica: set pool.num_gpus"
                f"={self.context_parallel} (it is {self.pool.num_gpus:g})"
            )
        for option in ("cache", "offload"):
            # A cache may decide otherwise on each rank, and offloading leaves a GPU of the rank idle.
            if getattr(self, option) not in (None, "none"):
                raise ValueError(f"context_parallel does not go together with {option}")
        return self


# Keys that a video service leaves to us. What it makes a video with is in `endpoint.request`.
_OF_SERVICES = frozenset({"kind", "model", "version", "endpoint", "strategy", "preview", "batch_size",
                          "time_limit_s", "store", "pool"})  # fmt: skip


class Checklist(Section):
    """Yes/no questions about a video, with weights and dimensions.

    Either `file`, one YAML with a list `questions` of {question, weight, dimension}, or
    VisionReward's published files: `questions` (one per line) and `weights` (a JSON list), with
    `dimensions` mapping a name to 1-based question ranges such as "1-4, 36-37".
    """

    file: Source | None = None
    questions: Source | None = None
    weights: Source | None = None
    dimensions: dict[str, str] = {}
    strip_newlines: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> Checklist:
        if (self.file is None) == (self.questions is None):
            raise ValueError("give either `file`, or `questions` with `weights`")
        if self.questions is not None and self.weights is None:
            raise ValueError("`questions` needs `weights`, a JSON list with one number per question")
        if self.file is not None:
            refuse_unused(self, "weights dimensions strip_newlines", "with `file`, which has all of it")
        return self

    def files(self) -> dict[str, str | None]:
        return {"file": self.file, "questions": self.questions, "weights": self.weights}


class Aesthetic(Section):
    """LAION's aesthetic predictor: CLIP ViT-L/14 and a linear layer on its image features."""

    clip: Source
    head: Source = Field(description="a safetensors file with `weight` (1, features) and `bias` (1)")


# A measure of `kind: vbench`, and the keys of what it is made with.
Dimension = Literal[
    "temporal_flickering", "dynamic_degree", "motion_magnitude", "background_consistency",
    "subject_consistency", "aesthetic_quality", "appearance_style",
]  # fmt: skip
_MADE_WITH = {
    "background_consistency": ("clip",),
    "subject_consistency": ("dino",),
    "aesthetic_quality": ("aesthetic",),
    "appearance_style": ("clip", "styles"),
}


class Reward(Modelled):
    """The reward model: one of the package's, or another's (see `Modelled`).

    `convention`: sum01 adds the weights of the questions answered yes (VPO);
    mean_pm1 is VisionReward's repository script, sum(w * (+1|-1)) / n. With `kind: openai` the
    model is one of the endpoint's: dtype waits for `kind: visionreward`, and attention, template, device
    and tokens are refused. `kind: vbench` measures `dimensions`, and the score is their mean."""

    group: ClassVar[str] = "vpo_ray.rewards"
    known: ClassVar[tuple[str, ...]] = ("visionreward", "openai", "vbench")

    kind: Kind = "visionreward"
    model: Source = Field("", description="a plugin may do without")
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
    checklist: Checklist | None = Field(None, description="a plugin may do without")
    dimensions: list[Dimension] = Field([], description="of kind vbench")
    clip: Source = Field("", description="CLIP ViT-B/32, for background_consistency and appearance_style")
    dino: Source = Field("", description="DINO ViT-B/16, for subject_consistency")
    aesthetic: Aesthetic | None = Field(None, description="for aesthetic_quality")
    styles: Source = Field("", description="VBench_full_info.json with the styles of its own prompts")
    batch_size: Positive = 1
    device: str = "auto"
    pool: Pool = Pool()

    def located(self) -> Reward:
        """The settings with absolute paths, which hold on every node that mounts them."""
        found: dict[str, Any] = {
            name: locate(getattr(self, name)) for name in ("model", "clip", "dino", "styles")
        }
        for name in ("checklist", "aesthetic"):
            if (part := getattr(self, name)) is not None:
                found[name] = part.model_copy(update={key: locate(path) for key, path in sources(part)})
        if (plugin := find_usable(self)) is not None:
            found["options"] = plugin.located(self)
        return self.model_copy(update=found)

    def models(self) -> dict[str, str]:
        """The checkpoints that are loaded where it runs, by key."""
        if self.kind == "visionreward":
            return {"model": self.model}
        if (plugin := find_usable(self)) is not None:
            return plugin.models(self)
        found = {
            "clip": self.clip,
            "dino": self.dino,
            "aesthetic.clip": self.aesthetic and self.aesthetic.clip,
        }
        return {key: name for key, name in found.items() if name} if self.kind == "vbench" else {}

    def files(self) -> dict[str, str]:
        """The other files that it reads, by key."""
        if (plugin := find_usable(self)) is not None:
            return plugin.files(self)
        parts = {"checklist": self.checklist, "aesthetic": self.aesthetic}
        found = {k: path for name, part in parts.items() if part for k, path in sources(part, f"{name}.")}
        found.pop("aesthetic.clip", None)
        return found | ({"styles": self.styles} if self.styles else {})

    @model_validator(mode="after")
    def _all_used(self) -> Reward:
        if self.is_plugin:
            return self
        refuse_unused(self, "options", f"with kind: {self.kind}")
        if self.kind == "vbench":
            return self._measures()
        require_keys(self, "model checklist")
        refuse_unused(self, "dimensions clip dino aesthetic styles", f"with kind: {self.kind}")
        refuse_keys(self.endpoint, ["answers"], "a reward, whose answers are its scores")
        if self.kind == "visionreward":
            refuse_unused(self, "endpoint", "with kind: visionreward")
            return self
        local = "attention template device yes_tokens no_tokens"
        refuse_unused(self, local, "with kind: openai: they are of a model that is loaded here")
        if not self.endpoint.logprobs:
            refuse_unused(self, "rule", "with endpoint.logprobs: false")
        return self

    def _measures(self) -> Reward:
        others = "model endpoint dtype attention frame_strategy template rule yes_tokens no_tokens convention"
        refuse_unused(self, f"{others} checklist", "with kind: vbench, which asks no questions")
        require_keys(self, "dimensions")
        if twice := {name for name in self.dimensions if self.dimensions.count(name) > 1}:
            raise ValueError(f"dimensions: {', '.join(sorted(twice))} is there twice")
        used = {key for name in self.dimensions for key in _MADE_WITH.get(name, ())}
        require_keys(self, " ".join(sorted(used)))
        unused = {"clip", "dino", "aesthetic", "styles"} - used
        refuse_unused(self, " ".join(sorted(unused)), f"with the dimensions {', '.join(self.dimensions)}")
        return self


class RenderGate(Modelled):
    """What a prompt must reach before it is rendered: the least of each dimension, by a reward that reads the
    prompt alone (`kind: text`, or another's with `score_prompts`). A candidate below it is skipped, with
    the reason. `device` is the encoder's, beside the video model."""

    group: ClassVar[str] = "vpo_ray.rewards"
    known: ClassVar[tuple[str, ...]] = ()

    kind: Kind = "text"
    model: Source = Field("", description="for another's reward")
    device: str = "cpu"
    least: dict[str, float] = Field(min_length=1, description="by dimension; `score` is the reward's own")

    def located(self) -> RenderGate:
        """The settings with absolute paths, which hold on every node that mounts them."""
        found: dict[str, Any] = {"model": locate(self.model)}
        if (plugin := find_usable(self)) is not None:
            found["options"] = plugin.located(self)
        return self.model_copy(update=found)

    def models(self) -> dict[str, str]:
        """The checkpoints that are loaded where it runs, by key."""
        return {} if (plugin := find_usable(self)) is None else plugin.models(self)

    def files(self) -> dict[str, str]:
        """The other files that it reads, by key."""
        return {} if (plugin := find_usable(self)) is None else plugin.files(self)


class Pair(Section):
    """How preference pairs are chosen. The defaults are VPO's (facts: paper 3.3 and its code).

    `preset` fills the keys that are not given with a published rule (`vpo_ray/data/pair_presets.yaml`), and
    the section `formula` where the recipe has none.
    """

    preset: str | None = None
    by: Annotated[
        Literal["score", "formula"], Field(description="what decides: a reward's score or the formula")
    ] = "score"
    reward: Annotated[
        str | None, Field(description="one of more_rewards that decides; `reward` when unset")
    ] = None
    margin: Annotated[float, Field(ge=0)] = 0.5
    dominance: Literal["none", "question", "dimension"] = "question"
    choice: Annotated[
        Literal["first", "best", "all"], Field(description="which of a query's video pairs are taken")
    ] = "first"
    ranks: Annotated[
        Positive | None,
        Field(description="a chosen video is among so many best of its query; any when unset"),
    ] = None
    max_words: Annotated[Positive | None, Field(description="of a chosen prompt, split at white space")] = (
        None
    )
    video_per_query: Annotated[int, Field(ge=0)] = 1
    text_per_query: Annotated[int, Field(ge=0)] = 1
    precedence: Literal["text", "video", "both"] = "text"
    also: Annotated[
        Source | None, Field(description="folder of further pairs, as `vpo collect` writes them")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("preset"), str):
            return given
        presets = pair_presets()
        if given["preset"] not in presets:
            raise ValueError(f"preset {given['preset']!r} is not known; there are {', '.join(presets)}")
        return {**presets[given["preset"]]["pair"], **given}

    @model_validator(mode="after")
    def _all_used(self) -> Pair:
        if self.by == "formula":
            refuse_unused(self, "reward", "with by: formula, which names its rewards")
        if self.choice == "all":
            refuse_unused(self, "video_per_query", "with choice: all")
        return self
