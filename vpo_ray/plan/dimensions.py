"""Which dimensions a recipe's rewards give, as far as that is known before they are loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping

from vpo_ray.engines.reward import checklist as checklists
from vpo_ray.recipe import Formula, Recipe, Reward, plugins
from vpo_ray.recipe.formula import reward_of


def formula_problems(recipe: Recipe) -> Iterator[str]:
    """A line for each dimension that the formula names and no reward gives.

    A reward that cannot be asked here is taken on trust: `vpo pair` counts the rows without a dimension.
    """
    if recipe.formula is None:
        return
    known: dict[str, frozenset[str] | None] = {}
    for key in ("terms", "gates"):
        for name in getattr(recipe.formula, key):
            reward, _, dimension = name.partition(".")
            if dimension in ("", "score"):
                continue
            if reward not in known:
                try:
                    known[reward] = known_dimensions(_section(recipe, reward))
                except plugins.PluginError as error:
                    known[reward] = None
                    yield f"formula.{key}.{name}: {error}"
            given = known[reward]
            if given is not None and dimension not in given:
                close = difflib.get_close_matches(dimension, given, n=1)
                there = ", ".join(sorted(given)) or "none"
                hint = f"did you mean {reward}.{close[0]}?" if close else f"there are: {there}"
                yield f"formula.{key}.{name}: {reward} gives no dimension {dimension}; {hint}"


def fitness_problems(recipe: Recipe) -> Iterator[str]:
    """A line for each score that `evolve.fitness` or `evolve.thresholds` names and not exactly one reward
    gives. A reward that cannot be asked here is taken on trust."""
    if recipe.evolve is None:
        return
    given: dict[str, frozenset[str] | None] = {}
    for reward in ("reward", *recipe.more_rewards):
        try:
            given[reward] = known_dimensions(_section(recipe, reward))
        except plugins.PluginError:
            given[reward] = None  # said by the check of plugins
    fitness, thresholds = recipe.evolve.fitness, recipe.evolve.thresholds
    named: dict[str, Iterable[str]] = {"thresholds": thresholds}
    if isinstance(fitness, Formula):
        named |= {"fitness.terms": fitness.terms, "fitness.gates": fitness.gates}
    else:
        named["fitness"] = fitness
    for key, names in named.items():
        for name in names:
            if why := _not_given(name, given):
                yield f"evolve.{key}.{name}: {why}"


def _not_given(name: str, given: Mapping[str, frozenset[str] | None]) -> str | None:
    """What is wrong with a score's name (see `stages.evolution.dimension`), where that is known."""
    reward, _, dimension = name.partition(".")
    of = given.get(reward, frozenset())
    if name in given or of is None or dimension in of or (reward in given and dimension == "score"):
        return None
    giving = [f"{reward}.{name}" for reward, known in given.items() if known is not None and name in known]
    trusted = any(known is None for known in given.values())
    if len(giving) > 1:
        return f"several rewards give it; say which: {', '.join(giving)}"
    if giving or (trusted and not dimension):
        return None
    there = [*given, *sorted(f"{r}.{d}" for r, known in given.items() for d in known or ())]
    return f"no reward gives it; there are: {', '.join(there)}"


def _section(recipe: Recipe, reward: str) -> Reward:
    return recipe.reward if reward == "reward" else recipe.more_rewards[reward_of(reward)]


def known_dimensions(reward: Reward) -> frozenset[str] | None:
    """The names of a reward's dimensions; None where they are not known: its checklist is elsewhere, or its
    plugin does not say."""
    if reward.kind == "vbench":
        return frozenset(reward.dimensions)
    if reward.is_plugin:
        plugin = plugins.find_usable(reward)
        return None if plugin is None else plugin.dimensions(reward)
    if reward.checklist is None or any("://" in path for path in reward.checklist.files().values() if path):
        return None
    try:
        questions = checklists.load_checklist(reward.checklist).questions
    except (checklists.ChecklistError, OSError):
        return None  # said by the check of the checklist
    return frozenset(question.dimension for question in questions if question.dimension is not None)
