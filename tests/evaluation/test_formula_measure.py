"""The measure `formula` of an evaluation is the recipe's formula over each sample's raw measures."""

from typing import Any

from vpo_ray.evaluation.evaluate import add_formula
from vpo_ray.recipe import Formula


def sample(query: str, policy: str, video_model: str = "render", **values: float | None) -> dict[str, Any]:
    measures = [{"name": name.replace("__", "."), "value": value} for name, value in values.items()]
    return {
        "set": "eval", "video_model": video_model, "query_id": query, "policy": policy, "measures": measures,
    }  # fmt: skip


def added(rows: list[dict[str, Any]], **formula: Any) -> list[dict[str, float]]:
    """What `add_formula` adds to each row."""
    before = [len(row["measures"] or ()) for row in rows]
    add_formula(rows, Formula.model_validate(formula))
    found = [(row["measures"] or [])[count:] for row, count in zip(rows, before, strict=True)]
    return [{measure["name"]: measure["value"] for measure in measures} for measures in found]


def test_samples_with_scores_get_the_total_with_the_last_weights() -> None:
    rows = [
        sample("a", "query", reward=1.0, vlm__motion=4.0, prompt__words=3.0),
        sample("a", "dpo", reward=2.0, vlm__motion=1.0),
        sample("b", "query", prompt__words=3.0),
        sample("b", "dpo", reward=2.0, vlm__motion=None),
        sample("c", "dpo") | {"measures": None},
    ]
    terms = {"reward": [7, 1], "vlm.motion": {"weight": 0.5, "above": 2}}
    assert added(rows, terms=terms) == [
        {"formula": 3.0, "formula.accepted": 1.0}, {"formula": 2.5, "formula.accepted": 0.0}, {}, {}, {},
    ]  # fmt: skip


def test_gates_leave_samples_out_and_nothing_is_accepted_without_thresholds() -> None:
    rows = [sample("a", name, reward=value) for name, value in (("query", 1.0), ("dpo", 3.0))]
    assert added(rows, terms={"reward": 2}, gates={"reward": {"above": 2}}) == [{}, {"formula": 6.0}]


def test_values_are_normalised_among_the_samples_of_a_query_and_video_model() -> None:
    rows = [
        sample("a", "query", reward=10.0), sample("a", "dpo", reward=30.0), sample("b", "query", reward=50.0),
        sample("a", "dpo", "other", reward=1.0), sample("b", "dpo", reward=40.0),
    ]  # fmt: skip
    totals = [found["formula"] for found in added(rows, terms={"reward": 1}, normalise="rank")]
    assert totals == [0.0, 1.0, 1.0, 0.5, 0.0]
