"""Recipe section `formula`: one number of many rewards.

A term is a raw dimension of `reward` or of one of `more_rewards`, by the name that evaluations have for it:
`videoscore.visual_quality` is a dimension, `videoscore` (or `videoscore.score`) the reward's own score. Rows
keep raw dimensions, so that another formula needs no new scoring. `stages.formula` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from vpo_ray.recipe.base import Section, refuse_unused

_PRESETS = Path(__file__).parents[1] / "data" / "pair_presets.yaml"
VIDEOSCORE = "videoscore"  # its name in more_rewards that presets take, or else `reward`


@cache
def pair_presets() -> dict[str, dict[str, Any]]:
    """Published rules of pairing by name: `sources` of the numbers, settings of the section `pair`, and of
    `formula` where they have one."""
    presets: dict[str, dict[str, Any]] = yaml.safe_load(_PRESETS.read_text("utf-8"))
    return presets


class FormulaTerm(Section):
    """What a dimension adds: weight × scale × value, or weight × the normalised value.

    `scale` brings a dimension into the range of the others, and `weight` says what it is worth. A list of
    weights is by round (of `--rounds`; in `evolve.fitness`, of the evolution): the first is of round 1, and
    the last one holds from then on.
    """

    weight: float | Annotated[list[float], Field(min_length=1)] = 1.0
    scale: float = 1.0
    above: float | None = Field(
        None, description="a video is chosen only where the raw value is above this; it may be rejected"
    )

    def weight_at(self, round: int | None) -> float:
        """The weight of a round from 1; the last one with None."""
        if not isinstance(self.weight, list):
            return self.weight
        return self.weight[-1 if round is None else min(round, len(self.weight)) - 1]


class FormulaGate(Section):
    """Where the raw value must be; a video outside is neither chosen nor rejected."""

    above: float | None = None
    below: float | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> FormulaGate:
        if self.above is None and self.below is None:
            raise ValueError("give `above`, `below` or both")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"no value is above {self.above:g} and below {self.below:g}")
        return self


def _flat(given: Any) -> Any:
    """Names with dots in place of nested ones, which `--set formula.terms.vlm.motion.weight=2` gives; a bare
    number or list is a weight."""
    if not isinstance(given, Mapping):
        return given
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, (int, float, list)):
            found[name] = {"weight": value}
        elif not isinstance(value, Mapping) or "." in str(name):
            found[name] = value
        else:
            nested = {key: inner for key, inner in value.items() if isinstance(inner, Mapping)}
            own = {key: inner for key, inner in value.items() if key not in nested}
            found |= {name: own} if own or not nested else {}
            found |= {f"{name}.{key}": {**found.get(f"{name}.{key}", {}), **v} for key, v in nested.items()}
    return found


_Named = BeforeValidator(_flat)


class Formula(Section):
    """A weighted sum of raw dimensions, with what a video must pass.

    `normalise` makes the values of one query's videos comparable before they are weighed: zscore subtracts
    their mean and divides by their standard deviation, rank gives 0 to the least and 1 to the greatest.
    """

    terms: Annotated[dict[str, FormulaTerm], _Named, Field(min_length=1)]
    gates: Annotated[dict[str, FormulaGate], _Named] = {}
    normalise: Literal["none", "zscore", "rank"] = "none"

    @model_validator(mode="after")
    def _weighs_something(self) -> Formula:
        for round in range(1, self.last_round + 1):
            if not any(term.weight_at(round) * term.scale for term in self.terms.values()):
                raise ValueError(f"terms: nothing has a weight in round {round}")
        if self.normalise != "none":
            for name, term in self.terms.items():
                try:
                    refuse_unused(term, "scale", f"with normalise: {self.normalise}")
                except ValueError as error:
                    raise ValueError(f"terms.{name}: {error}") from None
        return self

    def names(self) -> list[str]:
        """Every dimension and reward that it looks at, terms first."""
        return list(dict.fromkeys((*self.terms, *self.gates)))

    @property
    def last_round(self) -> int:
        """The first round with the weights that hold from then on; 1 where no weight is a list."""
        return max(len(term.weight) if isinstance(term.weight, list) else 1 for term in self.terms.values())

    def at(self, round: int | None) -> Formula:
        """The formula with the weights of one round; with None, those that hold in the end."""
        terms = {
            name: term.model_copy(update={"weight": term.weight_at(round)})
            for name, term in self.terms.items()
        }
        return self.model_copy(update={"terms": terms})


def reward_of(name: str) -> str:
    """The reward that a term's or gate's name is of."""
    return name.partition(".")[0]


def preset_formula(preset: str, rewards: Mapping[str, Any]) -> dict[str, Any] | None:
    """The formula of a pair preset, if it has one.

    Args:
        rewards: the recipe's more_rewards; VideoScore is `reward` where none of them has its name.
    """
    formula: dict[str, Any] | None = pair_presets().get(preset, {}).get("formula")
    if formula is None or VIDEOSCORE in rewards:
        return formula
    terms = {
        f"reward.{name.partition('.')[2]}" if reward_of(name) == VIDEOSCORE else name: term
        for name, term in formula["terms"].items()
    }
    return {**formula, "terms": terms}
