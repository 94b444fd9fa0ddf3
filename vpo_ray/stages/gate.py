"""The gate of the render stage: which aligned prompts are worth a video, by their text alone.

The renderer asks it before anything else. A prompt below `gate.least` is skipped with the reason, which the
ledger counts beside the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vpo_ray.engines.results import said_by
from vpo_ray.engines.reward import Scored
from vpo_ray.engines.reward.results import checked_scores
from vpo_ray.recipe import Recipe, RenderGate
from vpo_ray.recipe.plugins import PluginError, find
from vpo_ray.records import Row, failed
from vpo_ray.stages.facts import Fact, of_file, of_model, of_plugin, of_versions

BELOW = "below the gate: "


class PromptGate:
    """A replica's gate.

    Raises:
        PluginError: its reward cannot be built, or reads no prompts.
    """

    def __init__(self, settings: RenderGate) -> None:
        for problem in gate_problems(settings):
            raise PluginError(problem)
        self.settings, self._reward = settings, find(settings).build(settings)

    def judged(self, rows: Sequence[Row]) -> list[Row]:
        """The rows in their order, with `skipped` where they are below the gate, and an error where the
        reward has one.

        Raises:
            PluginError: `least` has a dimension that the reward does not give.
        """
        given = self._reward.score_prompts([row["prompt"] for row in rows], [row["query"] for row in rows])
        found = checked_scores(given, len(rows), f"gate: {type(self._reward).__name__}.score_prompts")
        return [self._row(*pair) for pair in zip(rows, found, strict=True)]

    def _row(self, row: Row, result: Scored | Exception) -> Row:
        if isinstance(result, Exception):
            return failed(row, "render", f"the gate: {said_by(result)}")
        marks = {"score": result.score, **result.dimensions}
        for name, least in self.settings.least.items():
            if name not in marks:
                raise PluginError(f"gate.least: no {name!r}; its reward gives {', '.join(marks)}")
            if not marks[name] >= least:
                return {**row, "skipped": f"{BELOW}{name} under {least:g}"}
        return row


def gate_problems(settings: RenderGate) -> Iterator[str]:
    """What is wrong with a gate whose reward is here, as far as that says beforehand."""
    plugin = find(settings)
    if isinstance(plugin.builder, type) and not hasattr(plugin.builder, "score_prompts"):
        yield f"gate.kind: {plugin.target} reads no prompts: it has no score_prompts"
        return
    if (given := plugin.dimensions(settings)) is None:
        return
    known = ", ".join(sorted(given))
    for name in settings.least:
        if name not in (*given, "score"):
            yield f"gate.least.{name}: with these options {plugin.target} gives {known}"


def is_below(row: Row) -> bool:
    """Whether the gate stopped a row."""
    return (row.get("skipped") or "").startswith(BELOW)


def gate_facts(recipe: Recipe) -> Iterator[Fact]:
    """What the gate's verdicts depend on."""
    if recipe.gate is None:
        return
    yield from of_plugin("gate", recipe.gate)
    for name, path in recipe.gate.files().items():
        yield from of_file(f"gate.{name}", path)
    if models := recipe.gate.models():
        yield from of_versions("torch", "transformers")
    for name, path in models.items():
        yield from of_model(f"gate.{name}", path)
