"""Recipe section of prompt evolution: an LLM rewrites a query again and again, by what its videos scored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from vpo_ray.recipe.base import Positive, Section, Source, Temperature, refuse_unused
from vpo_ray.recipe.formula import Formula, FormulaTerm
from vpo_ray.recipe.queries import NearDuplicates
from vpo_ray.recipe.text import ChatModel

_PRESETS = Path(__file__).parents[1] / "data" / "evolution_presets.yaml"


@cache
def evolution_presets() -> dict[str, dict[str, Any]]:
    """Published ways to evolve prompts, by name: `settings` of the section and `sources` of the numbers."""
    presets: dict[str, dict[str, Any]] = yaml.safe_load(_PRESETS.read_text("utf-8"))
    return presets


_FORMULA = "formula"  # as a fitness: the recipe's own


def _weights_or_formula(given: Any) -> Any:
    """Plain weights as they are; all else as a Formula, whose terms may be given without `terms`."""
    if given == _FORMULA:
        raise ValueError("formula needs a section `formula`, which it takes")
    if not isinstance(given, Mapping) or all(isinstance(value, (int, float)) for value in given.values()):
        return given
    return Formula.model_validate(given if given.keys() & Formula.model_fields.keys() else {"terms": given})


_Fitness = BeforeValidator(
    _weights_or_formula, json_schema_input_type=Literal["formula"] | dict[str, float] | Formula
)


def with_fitness_of_recipe(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's tree, with the section `formula` in place of `evolve.fitness: formula` where it has both."""
    evolve, formula = given.get("evolve"), given.get("formula")
    if not isinstance(evolve, Mapping) or evolve.get("fitness") != _FORMULA or formula is None:
        return given
    return {**given, "evolve": {**evolve, "fitness": formula}}


class Evolve(Section):
    """Prompts of a query, evolved against the rewards: each round an LLM sees the best so far with their
    scores and writes new ones, which the judge reads before they are rendered.

    `preset` fills the keys that are not given (`vpo_ray/data/evolution_presets.yaml`). `llm` unset is the
    judge's model. `fitness` and `thresholds` name raw scores as evaluations do: `reward` and
    `reward.dimension`, or one of `more_rewards` by its name; a dimension of one reward alone, by itself.
    `fitness` is weights by name, or a formula as the section `formula` is (`formula` takes that one), whose
    lists of weights are by the rounds of the evolution.
    """

    preset: str | None = None
    llm: ChatModel | None = None
    prompt: Source = "builtin:evolve"
    temperature: Temperature = 1.0
    max_tokens: Positive = 2048
    prompts: Positive = Field(3, description="new ones of a query in each round")
    top: Positive = Field(3, description="the best so far that the LLM is shown, beside the query itself")
    rounds: Positive = 8
    patience: Positive | None = Field(2, description="rounds without a better prompt that end a query")
    budget: Annotated[int, Field(ge=2)] | None = Field(
        None, description="videos of a query at most, its own among them"
    )
    near_duplicates: NearDuplicates | None = Field(
        NearDuplicates(), description="which prompts of a query count as repeated, beside equal ones"
    )
    fitness: Annotated[dict[str, float] | Formula, _Fitness] = Field(
        {}, description="weight by dimension, or a formula; the reward's score when empty"
    )
    thresholds: dict[str, float] = Field({}, description="what a target reaches at least, by dimension")
    margin: Annotated[float, Field(ge=0)] = Field(0.0, description="fitness of a target over the query's own")
    pairs: bool = Field(False, description="draw DPO pairs from the evolved prompts, too")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("preset"), str):
            return given
        presets = evolution_presets()
        if given["preset"] not in presets:
            raise ValueError(f"preset {given['preset']!r} is not known; there are {', '.join(presets)}")
        return {**presets[given["preset"]]["settings"], **given}

    @model_validator(mode="after")
    def _all_used(self) -> Evolve:
        if self.near_duplicates is not None:
            refuse_unused(self.near_duplicates, "drop", "in evolve: a repeated prompt is not rendered")
        return self

    @property
    def formula(self) -> Formula:
        """The fitness as a formula, with names as they are given."""
        if isinstance(self.fitness, Formula):
            return self.fitness
        weights = self.fitness or {"reward": 1.0}
        # Weights that are all 0 are refused in a formula, and were none here.
        terms = {name: FormulaTerm(weight=weight, above=None) for name, weight in weights.items()}
        return Formula.model_construct(terms=terms)

    @property
    def most_videos(self) -> int:
        """Videos of a query at most."""
        most = 1 + self.rounds * self.prompts
        return most if self.budget is None else min(most, self.budget)
