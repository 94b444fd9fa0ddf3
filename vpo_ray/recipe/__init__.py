"""A recipe: one YAML file that says which models, which data and how many resources a run takes.

The tree below is the whole configuration of `vpo`. It imports neither torch nor Ray, so that a
recipe is checked in milliseconds (`vpo plan recipe.yaml`). Unknown keys are refused, every error
names the key, and `--set render.steps=30` overrides a key from the command line.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from vpo_ray.recipe.base import Fraction, Place, Pool, Positive, Section, locate, refuse_unused, sources
from vpo_ray.recipe.endpoint import Endpoint
from vpo_ray.recipe.evaluation import EvaluatedPolicy, EvaluatedSet, Evaluation, Preference
from vpo_ray.recipe.evolution import Evolve, evolution_presets, with_fitness_of_recipe
from vpo_ray.recipe.file import RecipeError, read_tree, set_key
from vpo_ray.recipe.formula import Formula, FormulaGate, FormulaTerm, pair_presets, preset_formula, reward_of
from vpo_ray.recipe.plugins import pins, plugins_of
from vpo_ray.recipe.preview import Preview
from vpo_ray.recipe.profiles import Profile, check_evaluated, check_profiles
from vpo_ray.recipe.queries import Diversity, NearDuplicates, Queries, Rules, Splits
from vpo_ray.recipe.result_keys import OPERATIONAL, differences, engine_arguments, result_keys
from vpo_ray.recipe.serve import Feedback, Refine, Serve
from vpo_ray.recipe.text import ChatModel, Draft, Engine, Judge, Policy, Sample
from vpo_ray.recipe.train import (
    EVOLVED,
    Dpo,
    Evaluate,
    Floors,
    Guard,
    Offload,
    Rl,
    Sft,
    Track,
    Train,
    Training,
    TrainLora,
)
from vpo_ray.recipe.video import Checklist, Lora, Pair, Render, RenderGate, Reward, video_presets

__all__ = [
    "EVOLVED",
    "OPERATIONAL",
    "ChatModel",
    "Checklist",
    "Diversity",
    "Dpo",
    "Draft",
    "Endpoint",
    "Engine",
    "Evaluate",
    "EvaluatedPolicy",
    "EvaluatedSet",
    "Evaluation",
    "Evolve",
    "Feedback",
    "Floors",
    "Formula",
    "FormulaGate",
    "FormulaTerm",
    "Guard",
    "Judge",
    "Limits",
    "Lora",
    "NearDuplicates",
    "Offload",
    "Pair",
    "Policy",
    "Pool",
    "Preference",
    "Preview",
    "Profile",
    "Queries",
    "Recipe",
    "RecipeError",
    "Refine",
    "Render",
    "RenderGate",
    "Reward",
    "Rules",
    "Sample",
    "Section",
    "Serve",
    "Sft",
    "Splits",
    "Track",
    "Train",
    "TrainLora",
    "Training",
    "differences",
    "engine_arguments",
    "evolution_presets",
    "load",
    "load_serve",
    "locate",
    "pair_presets",
    "parse",
    "parse_stored",
    "result_keys",
    "serve_of",
    "sources",
    "video_presets",
]  # fmt: skip

# What a further reward cannot have of its own, with the defaults: a stored recipe names them.
_OF_ALL_REWARDS = {"batch_size": 1, "pool": Pool()}
_REWARD_NAME = re.compile("[a-z][a-z0-9_]*")


_PHASES: dict[str, type[Training]] = {"sft": Sft, "dpo": Dpo, "rl": Rl}


class Limits(Section):
    """When a run gives up. Errors are counted over finished candidates; `placement_timeout_s` is how
    long it waits for a node that a replica or a training worker fits on."""

    max_error_share: Fraction = 0.5
    min_rows: Positive = 20
    tries: Positive = 2
    placement_timeout_s: Annotated[float, Field(gt=0)] = 45
    max_cost: Annotated[
        float | None, Field(gt=0, description="of the endpoints' answers, in their prices' currency")
    ] = None


class Recipe(Section):
    """The whole recipe. `load` reads one, `fingerprint` names what it computes."""

    name: str
    seed: int = 0
    out: Place
    queries: Queries
    policy: Policy
    draft: Draft | None = None
    evolve: Evolve | None = None
    profiles: dict[str, Profile] = {}
    sft: Sft | None = None
    sample: Sample
    judge: Judge
    gate: RenderGate | None = None
    render: Render
    reward: Reward
    more_rewards: dict[str, Reward] = {}
    formula: Formula | None = None
    pair: Pair = Pair()
    dpo: Dpo | None = None
    rl: Rl | None = None
    evaluate: Evaluation | None = None
    serve: Serve = Serve()
    limits: Limits = Limits()

    @model_validator(mode="before")
    @classmethod
    def _formula_of_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        pair = given.get("pair")
        preset = pair.get("preset") if isinstance(pair, Mapping) else None
        if isinstance(preset, str) and given.get("formula") is None:
            more = given.get("more_rewards")
            formula = preset_formula(preset, more if isinstance(more, Mapping) else {})
            given = {**given, "formula": formula}
        return with_fitness_of_recipe(given)

    @model_validator(mode="after")
    def _trains_what_it_has(self) -> Recipe:
        if self.sft is not None and self.sft.data is None and self.draft is None:
            raise ValueError(
                "sft.data is missing: name a JSONL or Parquet file with `query` and `prompt`, "
                "add a draft section that makes it, or remove the sft section"
            )
        if self.sft is not None and self.sft.data == EVOLVED and self.evolve is None:
            raise ValueError("sft.data: evolved needs an evolve section, which makes it")
        if self.sft is not None and self.sft.lora is not None and not self.sft.lora.merge:
            raise ValueError(
                "sft.lora.merge is false, but candidates are sampled from a whole model: set it true"
            )
        return self

    @model_validator(mode="after")
    def _learns_in_one_way(self) -> Recipe:
        if self.dpo is not None and self.rl is not None:
            raise ValueError(
                "give one of dpo and rl: a run learns from its feedback in one way (name the checkpoint of "
                "another run as policy.model to go on from it)"
            )
        if self.rl is not None:
            others = " ".join(name for name in Pair.model_fields if name not in ("by", "reward"))
            refuse_unused(self.pair, others, "with rl, which learns from all candidates and not from pairs")
            if self.evolve is not None:
                refuse_unused(self.evolve, "pairs", "with rl, which learns from no pairs")
        return self

    @model_validator(mode="after")
    def _few_shot_policies_have_examples(self) -> Recipe:
        policies = self.evaluate.policies if self.evaluate is not None else {}
        for name, policy in policies.items():
            if policy.kind == "few_shot" and policy.examples is None and self.draft is None:
                raise ValueError(
                    f"evaluate.policies.{name}.examples is missing: name a file with `query` and `prompt`, "
                    "as there is no draft section whose examples could be shown"
                )
        return self

    @model_validator(mode="after")
    def _labels_where_ray_takes_them(self) -> Recipe:
        for name, section in (("sample", self.sample), ("judge", self.judge)):
            given = section.engine.engine_kwargs
            if section.pool.labels and (section.engine.pieces > 1 or "tensor_parallel_size" in given):
                raise ValueError(
                    f"{name}.pool.labels: an engine on several GPUs cannot be placed by labels; give the "
                    "nodes a custom resource and use pool.resources"
                )
        if self.serve.pool.labels:
            raise ValueError("serve.pool.labels: Ray Serve's engine takes none; use serve.pool.resources")
        return self

    @model_validator(mode="after")
    def _rewards_have_names(self) -> Recipe:
        measures = self.evaluate.rewards if self.evaluate is not None else {}
        for key, name, reward, taken in (
            *(("more_rewards", name, reward, ()) for name, reward in self.more_rewards.items()),
            *(
                ("evaluate.rewards", name, reward, ("reward", *self.more_rewards))
                for name, reward in measures.items()
            ),
        ):
            if not _REWARD_NAME.fullmatch(name) or name in (*OPERATIONAL, *taken):
                raise ValueError(f"{key}.{name}: choose another name, of a-z, 0-9 and _")
            if ignored := [part for part, unset in _OF_ALL_REWARDS.items() if getattr(reward, part) != unset]:
                raise ValueError(
                    f"{key}.{name}: {' and '.join(ignored)} cannot be set; all rewards of a video are "
                    "asked in one replica of reward.pool (give each its `device` there)"
                )
        if self.pair.reward is not None and self.pair.reward not in self.more_rewards:
            known = ", ".join(self.more_rewards) or "there is none"
            raise ValueError(f"pair.reward: no {self.pair.reward!r} in more_rewards ({known})")
        return self

    @model_validator(mode="after")
    def _formula_has_its_rewards(self) -> Recipe:
        if self.formula is None:
            if self.pair.by == "formula":
                raise ValueError("pair.by: formula needs a section `formula`")
            return self
        for key in ("terms", "gates"):
            for name in getattr(self.formula, key):
                if reward_of(name) not in ("reward", *self.more_rewards):
                    known = ", ".join(("reward", *self.more_rewards))
                    raise ValueError(
                        f"formula.{key}.{name}: no reward {reward_of(name)!r} (there are {known}): name a "
                        "reward, or its dimension as REWARD.DIMENSION"
                    )
        measures = self.evaluate.rewards if self.evaluate is not None else {}
        for section, rewards in {"more_rewards": self.more_rewards, "evaluate.rewards": measures}.items():
            if "formula" in rewards:
                raise ValueError(f"{section}.formula: choose another name, the recipe has a formula")
        return self

    @model_validator(mode="after")
    def _renders_what_pairs_take(self) -> Recipe:
        pair = self.pair
        relative = pair.by == "formula" and self.formula is not None and self.formula.normalise != "none"
        whole = {"pair.choice: all": pair.choice == "all", "pair.ranks": pair.ranks is not None,
                 "formula.normalise": relative}  # fmt: skip
        named = " and ".join(key for key, given in whole.items() if given)
        if self.render.strategy == "adaptive" and named:
            raise ValueError(
                f"render.strategy: adaptive renders no more videos than a pair takes, and {named} looks at "
                "all of a query: write strategy: all"
            )
        named = "rl" if self.rl is not None else named
        if self.render.preview is not None and named:
            raise ValueError(
                f"render.preview renders few candidates of a query in full, and {named} looks at all of "
                "them: leave preview out"
            )
        return self

    @model_validator(mode="after")
    def _scores_videos_that_it_serves(self) -> Recipe:
        videos = self.serve.videos
        if videos is not None and videos.reward is not None and not videos.score and videos.refine is None:
            raise ValueError("serve.videos.reward has no effect with score: false")
        return self

    @model_validator(mode="after")
    def _counts_a_price(self) -> Recipe:
        llms = [self.judge, *([self.draft.llm] if self.draft is not None and self.draft.llm else [])]
        llms += [self.evolve.llm] if self.evolve is not None and self.evolve.llm else []
        rewards = [self.reward, *self.more_rewards.values()]
        if self.evaluate is not None:
            llms += self.evaluate.llms()
            rewards += self.evaluate.rewards.values()
        asked = [llm.endpoint for llm in llms if llm.backend == "openai"]
        asked += [reward.endpoint for reward in rewards if reward.kind == "openai" or reward.is_plugin]
        renders = [self.render, *(self.evaluate.transfer.values() if self.evaluate is not None else ())]
        priced = [e.prompt_price or e.completion_price for e in asked] + [r.endpoint.cost for r in renders]
        if self.limits.max_cost is not None and not any(priced):
            raise ValueError(
                "limits.max_cost has no effect: no endpoint that this recipe asks has a prompt_price or a "
                "completion_price, and no video service a video_price or second_price"
            )
        return self

    @model_validator(mode="after")
    def _asks_under_profiles(self) -> Recipe:
        check_profiles(self.profiles)
        if self.sft is not None and self.sft.profile_column is not None and not self.profiles:
            raise ValueError("sft.profile_column has no effect without profiles")
        if self.evaluate is not None and self.evaluate.profile is not None:
            check_evaluated(self.evaluate.profile, self.evaluate.seeds, self.profiles)
        return self

    @model_validator(mode="after")
    def _learns_from_images_that_it_shows(self) -> Recipe:
        if self.sft is not None and self.sft.image_column is not None:
            if self.queries.image_column is None:
                raise ValueError("sft.image_column has no effect without queries.image_column")
            if self.policy.images == "ignore":
                raise ValueError("sft.image_column has no effect with policy.images: ignore")
        return self

    @property
    def learns(self) -> Literal["dpo", "rl"] | None:
        """The phase that learns from feedback."""
        return "dpo" if self.dpo is not None else "rl" if self.rl is not None else None

    @property
    def learning(self) -> Dpo | Rl | None:
        """The settings of the phase that learns from feedback."""
        return self.dpo or self.rl

    @property
    def drafts_first(self) -> bool:
        """Whether the loop needs drafts: SFT without a file of its own, or a recipe that is for them."""
        return self.draft is not None and (self.sft is None or self.sft.data is None)

    @property
    def evolves_first(self) -> bool:
        """Whether the loop needs evolved prompts: SFT learns them, or DPO pairs are drawn from them."""
        if self.evolve is None:
            return False
        return self.evolve.pairs or (self.sft is not None and self.sft.data == EVOLVED)

    def dump(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def fingerprint(self, *sections: str) -> str:
        """16 hex digits over every key that changes results (of `sections`, or of all).

        Keys at their defaults do not count, so that a key which a later version adds leaves the
        fingerprints of older recipes as they are.
        """
        given = result_keys(self.model_dump(mode="json", exclude_defaults=True))
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
        recipe = Recipe.model_validate(tree)
        if plugins := plugins_of(recipe):
            found, wrong = pins(plugins)
            if wrong:
                raise _refused(where, wrong)
            recipe = Recipe.model_validate(_with(tree, found))
    except ValidationError as error:
        raise _refused(where, error.errors()) from None
    return recipe


def _refused(where: str, errors: Sequence[Mapping[str, Any]]) -> RecipeError:
    lines = [f"  {_explain(e)}" for e in errors]
    return RecipeError(f"{where}: {len(lines)} problem{'s'[: len(lines) > 1]}\n" + "\n".join(lines))


def _with(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree with values at dotted keys that it has."""
    copied = copy.deepcopy(dict(tree))
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node: Any = copied
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return copied


def parse_stored(tree: Mapping[str, Any], where: str) -> Recipe:
    """The recipe that a run directory holds. Earlier versions wrote the keys of both phases into each."""
    known = {
        name: {key: value for key, value in tree[name].items() if key in phase.model_fields}
        for name, phase in _PHASES.items()
        if isinstance(tree.get(name), Mapping)
    }
    return parse({**tree, **known}, where)


def load_serve(path: str | None, overrides: Iterable[str]) -> Serve:
    """The `serve` section of a recipe, or its defaults, with `serve.key=value` overrides.

    What serving takes from other sections (the video and the reward model behind `/v1/videos`, and whether
    the policy is shown images) is filled in from the recipe.
    """
    if path is not None:
        return serve_of(load(path, overrides))
    tree: dict[str, Any] = {"serve": {}}
    for item in overrides:
        set_key(tree, item)
    if others := ", ".join(key for key in tree if key != "serve"):
        raise RecipeError(
            f"--set {others}: without a recipe there are keys of `serve` only, e.g. serve.port=9000"
        )
    try:
        return Serve.model_validate(tree["serve"])
    except ValidationError as error:
        raise RecipeError("\n".join(f"serve.{_explain(e)}" for e in error.errors())) from None


def serve_of(recipe: Recipe) -> Serve:
    """The recipe's `serve` section, with what it takes from others filled in; see `load_serve`."""
    settings, videos = recipe.serve, recipe.serve.videos
    if settings.images is None and recipe.policy.images == "ignore":
        settings = settings.model_copy(update={"images": "ignore"})
    if videos is None:
        return settings
    filled: dict[str, Any] = {
        "render": videos.render or recipe.render.model_copy(update={"preview": None}),
        "reward": videos.reward or recipe.reward,
    }
    if videos.refine is not None:
        own = {
            "evolve": recipe.evolve,
            "judge": recipe.judge.without_refining(),
            "more_rewards": recipe.more_rewards,
        }
        unset = {name: value for name, value in own.items() if getattr(videos.refine, name) is None}
        filled["refine"] = videos.refine.model_copy(update=unset)
    return settings.model_copy(update={"videos": videos.model_copy(update=filled)})


def _explain(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "recipe"
    if error["type"] == "extra_forbidden":
        for phase, section in _PHASES.items():
            given = location[0] in _PHASES and location[0] != phase and len(location) == 2
            if given and location[1] in section.model_fields:
                return f"{key}: a key of {phase}; {location[0]} has no such thing"
        known = error.get("known") or _keys_at(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else f"; known here: {', '.join(known)}"
        return f"{key}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{key}: missing; add it to the recipe or give --set {key}=..."
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(error.get("input"))
    return f"{key}: {message}" + (f" (got {shown[:80]})" if not isinstance(error.get("input"), dict) else "")


def _keys_at(location: list[str]) -> list[str]:
    model: Any = Recipe
    names_follow = False
    for part in location:
        if names_follow:
            names_follow = False
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        names_follow = getattr(field.annotation, "__origin__", None) is dict
        args = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((a for a in args if isinstance(a, type) and issubclass(a, Section)), None)
    return list(getattr(model, "model_fields", {}))
