"""Held-out rows, the best evaluation, early stopping, and the guard against degenerate DPO."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from train_data import pairs, settings

from vpo_ray.recipe import Evaluate
from vpo_ray.records import Row
from vpo_ray.train.checkpoints import choose_exported
from vpo_ray.train.degenerate import WINDOW, degenerate
from vpo_ray.train.examples import Example
from vpo_ray.train.held_out import best, enough, evaluation_due, hold_out, score


def examples(count: int, per_query: int = 2) -> tuple[list[Example], dict[str, str]]:
    groups = {f"pair-{n}": f"query-{n // per_query}" for n in range(count)}
    return [Example(name, None, ()) for name in groups], groups  # type: ignore[arg-type]


def test_whole_queries_are_held_out_by_their_content():
    rows, groups = examples(400)
    trained, held_out = hold_out(rows, groups, 0.2)
    assert 50 < len(held_out) < 110
    assert not {groups[e.id] for e in trained} & {groups[e.id] for e in held_out}
    assert sorted(e.id for e in trained + held_out) == sorted(groups)
    # Other rows move none: half of them, in another order, are split alike.
    again = hold_out(rows[::-2], groups, 0.2)[1]
    assert {e.id for e in again} <= {e.id for e in held_out}


def test_a_share_holds_out_at_least_one_query_and_none_holds_out_nothing():
    rows, groups = examples(6)
    assert len(hold_out(rows, groups, 1e-6)[1]) == 2
    assert hold_out(rows, groups, 0) == (rows, [])


def test_evaluations_come_every_so_many_steps_or_epochs_and_at_the_end():
    def steps(**changes: Any) -> list[int]:
        return [n for n in range(1, 12) if evaluation_due(n, 11, 18, settings(global_batch=4, **changes))]

    assert steps() == [5, 10, 11]
    assert steps(evaluate=Evaluate(share=0.1, steps=3)) == [3, 6, 9, 11]


def curve(losses: list[float | None]) -> list[Row]:
    return [
        {"step": n, "loss": 1.0} | ({} if loss is None else {"eval_loss": loss, "eval_margin": -loss})
        for n, loss in enumerate(losses, start=1)
    ]


def test_training_stops_after_enough_evaluations_without_a_better_one():
    chosen = Evaluate(share=0.1, patience=2)
    lines = curve([3.0, None, 2.0, 2.0, None, 2.5])
    assert [enough(lines[:n], chosen) for n in range(1, 7)] == [False] * 5 + [True]
    assert best(lines, chosen) is lines[2]
    assert best(lines, Evaluate(share=0.1, metric="margin")) is lines[2]
    assert best(curve([None, None]), chosen) is None
    assert not enough(lines, Evaluate(share=0.1))


NAN = math.nan


def test_an_evaluation_that_gave_no_number_is_never_the_best_and_counts_for_patience():
    chosen = Evaluate(share=0.1, patience=3)
    lines = curve([NAN, 2.0, NAN, math.inf, None, 3.0])
    assert best(lines, chosen) is lines[1]
    assert [enough(lines[:n], chosen) for n in range(1, 7)] == [False] * 5 + [True]
    assert best(curve([NAN, NAN]), chosen) is None
    assert enough(curve([NAN, NAN, NAN]), chosen)
    missing = [{"step": 1, "eval_loss": 1.0}, {"step": 2, "eval_margin": None}]
    assert best(missing, Evaluate(share=0.1, metric="accuracy")) is None
    assert best(missing, Evaluate(share=0.1, metric="margin")) is None


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, -1.0, NAN, math.inf, None]), min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from(["loss", "margin"]),
)
def test_what_ray_train_keeps_holds_the_best(losses: list[float | None], keep: int, metric: Any):
    """Ray Train orders by score, of equals the later behind, and keeps the last ones and the newest."""
    chosen = Evaluate(share=0.1, metric=metric, export="best")
    lines = curve(losses)
    kept: list[tuple[float, int]] = []
    for n, line in enumerate(lines, start=1):
        kept = sorted([*kept, (score(line, lines[:n], chosen), line["step"])])
        kept = [one for place, one in enumerate(kept) if place >= len(kept) - keep or one[1] == line["step"]]
        top = best(lines[:n], chosen)
        if top is not None:
            assert kept[-1][1] == top["step"]
            assert choose_exported(lines[:n], {step for _, step in kept}, chosen) is top
    json.loads(json.dumps(kept, allow_nan=False))


def test_a_checkpoint_that_is_gone_does_not_end_training():
    lines = curve([2.0, 1.0, 1.5, 3.0])
    chosen = Evaluate(share=0.1, export="best")
    assert choose_exported(lines, {1, 2, 3}, chosen) is lines[1]
    assert choose_exported(lines, {1, 3}, chosen) is lines[2]
    assert choose_exported(lines, set(), chosen) is lines[3]
    assert choose_exported(curve([NAN, None]), {1}, chosen)["step"] == 2


def test_best_and_patience_need_held_out_rows():
    for values in ({"patience": 2}, {"export": "best"}):
        with pytest.raises(ValidationError, match="need held-out rows"):
            Evaluate(**values)


def healthy(steps: int) -> list[Row]:
    line = {
        "chosen_reward": -0.1,
        "margin": 0.5,
        "end_logp": -1.0,
        "chosen_tokens": 40,
        "rejected_tokens": 20,
    }
    return [{"step": n + 1, **line} for n in range(steps)]


def test_the_guard_tells_a_chosen_log_probability_that_collapses():
    lines = healthy(3 * WINDOW)
    assert degenerate(lines, settings()) == {}
    # beta 0.1: a reward of -3.2 is 32 nats in 40 tokens, 0.8 a token
    for line in lines[-WINDOW:]:
        line["chosen_reward"] = -3.2
    found = degenerate(lines, settings())
    assert list(found) == ["chosen_drop"]
    assert "fell 0.80 nats a token" in found["chosen_drop"]
    assert "margin is 0.5" in found["chosen_drop"]
    assert degenerate(lines, settings(guard={"chosen_drop": 0})) == {}
    assert "fell 32.00 nats" in degenerate(lines, settings(length_normalise=True))["chosen_drop"]


def test_the_guard_tells_responses_that_stop_ending():
    lines = healthy(3 * WINDOW)
    for line in lines[-WINDOW:]:
        line["end_logp"] = -2.5
    found = degenerate(lines, settings())
    assert list(found) == ["end_drop"]
    assert "from -1.00 to -2.50" in found["end_drop"]
    assert "Chosen responses have 40 tokens, rejected ones 20" in found["end_drop"]
    assert degenerate(lines[: WINDOW - 1], settings()) == {}


@pytest.mark.engine
def test_evaluation_gives_the_held_out_rows_own_metrics_and_trains_nothing(make_worker: Any):
    worker = make_worker("dpo", pairs(8), settings(micro_batch=2, warmup_ratio=0), held_out=3)
    alone = make_worker("dpo", pairs(8)[5:], settings(global_batch=3, micro_batch=3))
    expected = alone.step(0)
    found = worker.evaluate()
    for name in ("loss", "accuracy", "margin", "chosen_reward", "chosen_logp", "rejected_logp"):
        assert found[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    assert found["eval_accuracy"] == 0, "policy and reference are equal: nothing is preferred"
    first = worker.step(0)
    assert first["rows"] == 5
    assert worker.evaluate()["eval_chosen_logp"] != found["eval_chosen_logp"]


@pytest.mark.engine
def test_a_checkpoint_before_a_node_goes_is_saved_at_once_and_is_no_evaluation(
    make_worker: Any, monkeypatch: pytest.MonkeyPatch
):
    """A spot node has 30 s, and early stopping counts evaluations: an undisturbed run has the same."""
    from vpo_ray.train import checkpoints

    chosen = settings(
        global_batch=2, epochs=2, save_steps=100, evaluate={"share": 0.5, "steps": 3, "patience": 1}
    )
    worker = make_worker("dpo", pairs(8), chosen, held_out=3)
    saved: list[tuple[int, bool]] = []
    notice = SimpleNamespace(preempted_node_ids=["a node"])
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: notice if worker.curve else None)
    monkeypatch.setattr(checkpoints, "save", lambda worker, step, wait: saved.append((step, wait)))
    worker._train(0)
    assert saved == [(2, True)]
    evaluated = [line["step"] for line in worker.curve if "eval_loss" in line]
    assert evaluated == [3, 6]


@pytest.mark.engine
def test_a_policy_that_collapses_is_told_once_with_numbers(make_worker: Any, caplog: Any):
    chosen = settings(global_batch=4, lr=0.3, epochs=30, schedule="constant", warmup_ratio=0)
    worker = make_worker("dpo", pairs(4), chosen)
    for step in range(2 * WINDOW):
        line = worker.step(step)
        worker.curve.append(line)
        worker._warn(line)
    warned = [line["warnings"] for line in worker.curve if "warnings" in line]
    assert sum("chosen_drop" in found for found in warned) == 1
    assert len([r for r in caplog.records if "gives up the chosen" in r.getMessage()]) == 1
