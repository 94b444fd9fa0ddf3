"""Recipe sections of training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vpo_ray.recipe.base import OFF, Amount, Fraction, Place, Positive, Section, Source, refuse_unused


class TrainLora(Section):
    """Low-rank adapters instead of full fine-tuning (arXiv 2106.09685), by peft.

    `merge` adds the trained adapter to the base model's weights on export; without it the export is
    the adapter alone, for peft or for vLLM's LoRA support.
    """

    r: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[str | list[str], Field(description="names of linear layers")] = "all-linear"
    rslora: Annotated[bool, Field(description="scale by alpha / sqrt(r), arXiv 2312.03732")] = False
    merge: bool = True


class Evaluate(Section):
    """Held-out rows: a share of the queries, by their content, that is never trained on.

    They are evaluated every `steps` optimizer steps (every epoch when unset), before every
    checkpoint and at the end. `patience` stops after that many evaluations without a better
    `metric`; `export: best` takes the weights of the best evaluation instead of the last ones.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    steps: Positive | None = None
    metric: Literal["loss", "accuracy", "margin"] = "loss"
    patience: Positive | None = None
    export: Literal["last", "best"] = "last"

    @model_validator(mode="after")
    def _has_rows(self) -> Evaluate:
        if self.share == 0 and (self.patience is not None or self.export == "best"):
            raise ValueError("patience and export: best need held-out rows: give share a value above 0")
        if self.share == 0:
            refuse_unused(self, "steps metric", "without held-out rows: give share a value above 0")
        return self


class EvaluateSft(Evaluate):
    """SFT has no pairs, and so neither accuracy nor margin."""

    metric: Literal["loss"] = "loss"


class Guard(Section):
    """When DPO is called degenerate; it warns and goes on. Both limits are ours, in nats (natural
    log of probability), as means over ten steps; 0 switches one off."""

    chosen_drop: Annotated[
        float,
        Field(
            ge=0, description="fall of the chosen responses' log-probability per token below the reference's"
        ),
    ] = 0.5
    end_drop: Annotated[
        float,
        Field(ge=0, description="fall of the end-of-turn token's log-probability: responses get longer"),
    ] = 1.0


class Track(Section):
    """Where curves go beside `metrics/<phase>.jsonl`. Addresses and keys come from the environment
    only: MLFLOW_TRACKING_URI (and its user, password or token), WANDB_API_KEY."""

    tensorboard: bool = True
    mlflow: Annotated[bool, Field(description="needs vpo-ray[mlflow] and MLFLOW_TRACKING_URI")] = False
    wandb: Annotated[bool, Field(description="needs vpo-ray[wandb] and WANDB_API_KEY")] = False
    project: Annotated[str, Field(description="MLflow's experiment, W&B's project")] = "vpo_ray"
    run_name: Annotated[str | None, Field(description="the recipe's name and the phase when unset")] = None

    @model_validator(mode="after")
    def _all_used(self) -> Track:
        if not (self.mlflow or self.wandb):
            refuse_unused(self, "project run_name", "without mlflow or wandb")
        return self


class Offload(Section):
    """Where ZeRO keeps what does not fit the accelerator. `nvme` needs `nvme_path` on every node, and
    ZeRO-3; optimizer offload needs ZeRO-1 or more, parameter offload ZeRO-3."""

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Place | None = None

    @model_validator(mode="after")
    def _has_a_path(self) -> Offload:
        if "nvme" in (self.optimizer, self.parameters) and not self.nvme_path:
            raise ValueError("nvme needs nvme_path, a folder on a local disk of every node")
        if "nvme" not in (self.optimizer, self.parameters):
            refuse_unused(self, "nvme_path", "without nvme")
        return self


class Training(Section):
    """What both training phases have."""

    epochs: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    lora: TrainLora | None = None
    evaluate: Evaluate = Evaluate()
    track: Track = Track()
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1
    global_batch: Positive
    micro_batch: Annotated[Positive, Field(description="rows that a pack takes at most")] = 1
    micro_tokens: Positive | None = Field(None, description="tokens that a pack takes at most, too")
    max_length: Positive = 2048
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    autocast: Annotated[Literal["off", "auto", "bfloat16"], OFF] = Field(
        "off",
        description="with dtype: float32, matrix products in bfloat16; auto: where the device is made for it",
    )
    activation_checkpointing: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 3
    offload: Offload = Offload()
    deepspeed: dict[str, Any] = {}
    save_steps: Positive | None = Field(None, description="steps between checkpoints to resume from")
    keep_checkpoints: Positive = Field(2, description="the best by evaluate.metric, or the newest")
    max_failures: Annotated[int, Field(ge=0)] = 2
    license: str | None = Field(None, description="of the export's model card; the base model's when unset")
    workers: Positive = 1
    use_gpu: bool = True
    resources_per_worker: dict[str, Amount] = {}
    labels: dict[str, str] = Field({}, description="of the nodes that workers may run on")

    @model_validator(mode="after")
    def _keeps_what_is_saved(self) -> Training:
        if self.save_steps is None and self.evaluate.export == "last":
            refuse_unused(self, "keep_checkpoints", "without save_steps or evaluate.export: best")
        return self

    @model_validator(mode="after")
    def _casts_what_is_wider(self) -> Training:
        if self.dtype == "bfloat16":
            refuse_unused(self, "autocast", "with dtype: bfloat16")
        return self

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> Training:
        offload, stage = self.offload, self.zero_stage
        if offload.parameters != "none" and stage < 3:
            raise ValueError(f"offload.parameters needs zero_stage 3, it is {stage}")
        if offload.optimizer == "nvme" and stage < 3:
            raise ValueError(f"offload.optimizer: nvme needs zero_stage 3, it is {stage}")
        if offload.optimizer == "cpu" and stage < 1:
            raise ValueError("offload.optimizer: cpu needs zero_stage 1 or more, it is 0")
        return self


EVOLVED: Literal["evolved"] = "evolved"  # of sft.data


class Sft(Training):
    """Supervised fine-tuning on queries and prompts."""

    data: Literal["evolved"] | Source | None = Field(
        None,
        description="SFT data: rows as in queries.path, with `query` and `prompt`; or `evolved`: see evolve",
    )
    profile_column: str | None = Field(
        None, description="of sft.data, with the name of the profile that a row's prompt is an example of"
    )
    image_column: str | None = Field(
        None, description="of sft.data, with paths or URIs of images, as queries.image_column has them"
    )
    evaluate: EvaluateSft = EvaluateSft()

    @model_validator(mode="after")
    def _reads_its_columns(self) -> Sft:
        if self.data in (None, EVOLVED):
            refuse_unused(self, "profile_column image_column", "without a file in sft.data")
        return self


class Dpo(Training):
    """Direct preference optimisation on the run's pairs."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    rpo_alpha: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of an SFT term on chosen")
    length_normalise: bool = False
    reference: Literal["updated", "kept"] = Field(
        "updated", description="of later rounds: the policy that it starts from, or the first round's"
    )
    overlap: bool = Field(
        False,
        description="of later rounds: sample and render while the round before trains, one policy behind",
    )
    guard: Guard = Guard()

    @model_validator(mode="after")
    def _all_used(self) -> Dpo:
        if self.loss == "ipo":
            refuse_unused(
                self, "label_smoothing length_normalise", "with loss: ipo, whose rewards are per token"
            )
        return self


class Floors(Section):
    """The reward of a candidate that the judge refuses, by its verdict, on the scale of the reward that
    decides; the lowest score of the run's candidates when unset."""

    unsafe: float | None = None
    imprecise: float | None = None
    refusal: float | None = None


class Rl(Training):
    """Group-relative policy optimisation on all candidates of each query (GRPO, arXiv 2402.03300).

    A candidate's advantage is its reward less the mean of its query's candidates, with `scale: group` over
    their standard deviation (Dr. GRPO, arXiv 2503.20783, leaves it out: `none`). `aggregate`: the loss is a
    mean over the tokens of a response and then over responses (GRPO), over all tokens of the batch (DAPO,
    arXiv 2503.14476), or a sum over tokens divided by the constant `length` (Dr. GRPO). `ratio: response` has
    one importance ratio a response, the geometric mean of its tokens' (GSPO, arXiv 2507.18071).
    """

    scale: Literal["group", "none"] = "group"
    aggregate: Literal["response", "token", "constant"] = "token"
    length: Positive = Field(256, description="tokens, of aggregate: constant")
    ratio: Literal["token", "response"] = "token"
    clip: Annotated[float, Field(gt=0, lt=1, description="of ratios, below 1")] = 0.2
    clip_high: Annotated[float, Field(gt=0, description="above 1; DAPO has 0.28")] = 0.2
    beta: Annotated[float, Field(ge=0, description="of the KL divergence from the reference")] = 0.0
    reference: Literal["updated", "kept"] = Field(
        "updated", description="of later rounds: the policy that it starts from, or the first round's"
    )
    overlap: bool = Field(
        False,
        description="of later rounds: sample and render while the round before trains, one policy behind",
    )
    floors: Floors = Floors()
    evaluate: EvaluateSft = EvaluateSft()

    @model_validator(mode="after")
    def _uses_what_it_has(self) -> Rl:
        if self.aggregate != "constant":
            refuse_unused(self, "length", f"with aggregate: {self.aggregate}")
        if self.beta == 0:
            refuse_unused(self, "reference", "with beta: 0")
        return self


class Train(Dpo):
    """Settings for either phase, for those who call `train` without a recipe."""

    data: Source | None = None
