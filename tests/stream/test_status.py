"""The status of a work: figures of counts, lines of a log, a live view on a terminal, the state of a run."""

import io
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vpo_ray import terminal
from vpo_ray.records import Shard
from vpo_ray.storage.run_dir import ROUND, RunDir
from vpo_ray.storage.run_state import SILENT_S, note, states, working
from vpo_ray.stream.meter import WINDOW_S, Meter, StepMeter
from vpo_ray.stream.progress import Busy, Progress, Steps
from vpo_ray.stream.status import Status
from vpo_ray.stream.status_text import duration, status_line, status_table


def counts(done: int, passed: int = 0, **more: Any) -> dict[str, Any]:
    return {"started": done, "done": done, "errors": 0, "passed": passed, "warm_up_s": 0, "tokens": 0} | more


def rendered(view: dict[str, Any]) -> str:
    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(status_table(view))
    return text.getvalue()


def test_a_stream_says_how_far_and_how_long_and_which_stage_is_slowest() -> None:
    meter = Meter("generate", {"sample": 20, "render": 10}, 100)
    meter.view(0, {"sample": counts(0), "render": counts(0)})
    now = {
        "sample": counts(40, tokens=1200, in_flight=6),
        "render": counts(5, 5, busy_s=30, there_s=40, errors=1, reason="RuntimeError: out of\nmemory"),
    }
    view = meter.view(20, now, 1.5)
    sample, render = view["stages"]
    assert (sample["done"], sample["total"], sample["rows_s"], sample["tokens_s"]) == (60, 100, 2, 60)
    assert sample["left_s"] == pytest.approx(40 / 2)
    assert (render["done"], render["busy"], render["left_s"]) == (20, 0.75, pytest.approx(80 / 0.5))
    assert (view["slowest"], view["left_s"]) == ("render", pytest.approx(160))
    assert status_line(view) == (
        "generate: sample 60/100 (2/s, 60 tokens/s), render 20/100 (0.25/s, 75% busy); "
        "1 failed in render: RuntimeError: out of memory; render is slowest; 3 min left; 1.50 paid"
    )
    shown = rendered(view)
    assert "render is slowest · 3 min left · 1.50 paid" in shown
    assert "render: RuntimeError: out of memory" in shown


def test_rates_are_of_the_last_minutes_and_nothing_is_promised_before_the_first_row() -> None:
    meter = Meter("generate", {}, 1000)
    assert meter.view(0, {"score": counts(0)})["left_s"] is None
    assert meter.view(10, {"score": counts(0)})["left_s"] is None
    for second in range(20, 620, 20):
        view = meter.view(second, {"score": counts(second if second < 400 else 400 + (second - 400) // 2)})
    assert view["stages"][0]["rows_s"] == pytest.approx(0.5, rel=0.05), f"of the last {WINDOW_S} s"
    finished = meter.view(700, {"score": counts(1000)})
    assert (finished["left_s"], finished["slowest"]) == (0, None)
    assert status_line(finished) == "generate: score 1000/1000"


def test_a_stage_is_timed_from_its_first_rows_and_the_slowest_is_no_stage_that_waits() -> None:
    meter = Meter("generate", {}, 100)
    idle = {"there_s": 0.0, "busy_s": 0.0}
    meter.view(0, {"render": counts(0, **idle), "score": counts(0, **idle)})
    meter.view(60, {"render": counts(0, **idle), "score": counts(0, **idle)})
    meter.view(70, {"render": counts(0, in_flight=4, **idle), "score": counts(0, **idle)})
    meter.view(100, {"render": counts(8, there_s=38, busy_s=38), "score": counts(0, **idle)})
    done = {"render": counts(20, there_s=100, busy_s=99), "score": counts(18, there_s=100, busy_s=20)}
    view = meter.view(160, done)
    render, score = view["stages"]
    assert (render["rows_s"], score["rows_s"]) == (pytest.approx(20 / 100), pytest.approx(18 / 60))
    assert render["left_s"] == pytest.approx(80 / 0.2)
    assert view["slowest"] == "render"
    for second in range(180, 500, 20):
        done = {name: counts(second // 8 - late, there_s=second, busy_s=second * share)
                for name, late, share in (("render", 0, 0.98), ("score", 4, 0.2))}  # fmt: skip
        view = meter.view(second, done)
    assert view["left_s"] == view["stages"][1]["left_s"] > view["stages"][0]["left_s"]
    assert view["slowest"] == "render", "the other one waits for its rows"


def test_a_training_says_its_steps() -> None:
    steps, meter = Steps(), StepMeter("sft", 90)
    assert status_line(meter.view(0, steps.told())) == "sft: starting workers"
    meter.view(50, steps.told())
    steps.tell(doing="training", step=1, loss=3.0, tokens=100, seconds=10.0)
    assert status_line(meter.view(60, steps.told())) == "sft: step 1 of 90, loss 3.000; 15 min left"
    for step in (2, 3):
        steps.tell(step=step, loss=3.5 - step / 2, tokens=100, seconds=10.0)
    view = meter.view(80, steps.told())
    assert status_line(view) == "sft: step 3 of 90, loss 2.000, 10 tokens/s; 14 min left"
    assert "step 3 of 90" in rendered(view)
    steps.tell(doing="writing the policy", step=90, tokens=0)
    assert status_line(meter.view(90, steps.told())).startswith("sft: writing the policy, step 90 of 90")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (98, "98 s"), (600, "10 min"), (7200, "2.0 h"), (864000, "10.0 days")]
)
def test_times_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_how_busy_a_pool_is() -> None:
    class Clock:
        now = 0.0

    busy = Busy(lambda: Clock.now)
    busy.change("a", 0)
    busy.change("b", 0)
    Clock.now = 10
    busy.change("a", 4)
    Clock.now = 30
    busy.change("a", -4)
    busy.tick()
    assert (busy.busy_s, busy.there_s, busy.in_flight) == (20, 60, 0)
    busy.change("b", 3)
    busy.change("b", 0)
    assert busy.in_flight == 0, "a replica that begins anew has lost what its last process had"


def test_the_progress_of_a_stage() -> None:
    progress = Progress(["render"])
    progress.add("render", "r1")
    progress.add("render", "r1", started=3)
    progress.add("render", "r1", "OSError: gone", done=2, errors=1, passed=1, tokens=7)
    found = progress.snapshot()["render"]
    assert (found["in_flight"], found["done"], found["tokens"], found["reason"]) == (1, 2, 7, "OSError: gone")


def look(views: list[dict[str, Any] | None]) -> Any:
    def next_one() -> dict[str, Any] | None:
        view = views.pop(0) if len(views) > 1 else views[0]
        if view is None:
            raise RuntimeError("nobody answers")
        return view

    return next_one


def view_of(step: int) -> dict[str, Any]:
    return StepMeter("dpo", 9).view(0.0, {"step": step, "loss": 0.5, "learnt": 1, "doing": "training"})


def test_a_log_gets_a_line_when_something_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpo_ray.stream.status.LOOK_S", 0.05)
    monkeypatch.setattr(logging.getLogger("vpo_ray"), "propagate", True)
    caplog.set_level(logging.INFO, "vpo_ray")
    views = [None, view_of(1), view_of(1), view_of(1), view_of(2)]
    with working(RunDir(tmp_path)), Status(RunDir(tmp_path), look(views), line_s=0.0):
        time.sleep(1)
    assert caplog.messages == ["dpo: step 1 of 9, loss 0.500", "dpo: step 2 of 9, loss 0.500"]
    [state] = states(RunDir(tmp_path))
    assert (state["state"], state["view"]["step"]) == ("done", 2)
    caplog.clear()
    with Status(RunDir(tmp_path), look([view_of(9)]), line_s=60):
        time.sleep(0.2)
    assert caplog.messages == [], "it is over before anyone asks how far it is"


def test_a_wait_in_which_nothing_moves_takes_few_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpo_ray.stream.status.LOOK_S", 0.01)
    monkeypatch.setattr("vpo_ray.stream.status.STILL", 1000)
    monkeypatch.setattr(logging.getLogger("vpo_ray"), "propagate", True)
    caplog.set_level(logging.INFO, "vpo_ray")
    meter = Meter("judge", {}, 4)
    waiting = {"judge": {"done": 0, "errors": 0, "passed": 0, "in_flight": 4, "warm_up_s": 0}}
    views = [meter.view(at / 2, waiting) for at in range(20)]
    with Status(RunDir(tmp_path), look(views), line_s=0.01):
        time.sleep(0.4)
    assert len(caplog.messages) <= 1, "the last one says where it ended"


def test_a_terminal_has_one_live_view_with_the_log_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "_ours", screen)
    monkeypatch.setattr("vpo_ray.stream.status.LOOK_S", 0.05)
    with Status(RunDir(tmp_path), look([view_of(3)])):
        time.sleep(0.6)
        terminal.Lines().write("01:02:03 I a line of the log [with brackets]\n")
        time.sleep(0.3)
    shown = screen.getvalue()
    assert "step 3 of 9" in shown
    assert "01:02:03 I a line of the log [with brackets]\n" in shown
    terminal.Lines().write("after")
    assert screen.getvalue().endswith("after")


def test_a_run_says_what_its_driver_does(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert states(run) == []

    def work() -> None:
        with working(run):
            with working(run):
                pass
            assert states(run)[0]["state"] == "running"
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        work()
    [state] = states(run)
    assert (state["state"], state["error"]) == ("failed", "no room")
    inner = RunDir(tmp_path / "evaluation/x")
    with working(run):
        with working(inner):
            inner.write_json(ROUND, {})
            note(inner, view={"what": "judge"})
        [state] = states(run)
        assert (state["state"], state["place"], state["view"]["what"]) == ("running", "evaluation/x", "judge")
    assert [state["state"] for state in (*states(inner), *states(run))] == ["done", "done"]
    with pytest.raises(KeyboardInterrupt), working(run):
        raise KeyboardInterrupt
    assert states(run)[0]["state"] == "stopped"
    with working(RunDir(tmp_path, Shard(2, 3))):
        assert [state["shard"] for state in states(run)] == [None, "2/3"]
    run.write_json("meta/state.json", {"state": "running", "updated": time.time() - SILENT_S - 1})
    assert states(run)[0]["state"] == "silent"
