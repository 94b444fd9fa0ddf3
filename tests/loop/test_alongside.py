"""Work beside other work ends with it, whoever fails first."""

import threading
import time

import pytest

from vpo_ray.loop import alongside as module
from vpo_ray.loop.alongside import alongside


def test_both_have_ended_behind_it() -> None:
    done: list[str] = []

    def slow(stop: threading.Event) -> None:
        time.sleep(0.3)
        done.append("beside")

    with alongside(slow):
        done.append("within")
    assert done == ["within", "beside"]


def test_what_fails_beside_is_raised_behind_what_is_within() -> None:
    done: list[str] = []

    def fails(stop: threading.Event) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"), alongside(fails):
        threading.Timer(0, done.append, ["within"]).run()
    assert done == ["within"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_within_stops_the_work_beside(error: type[BaseException]) -> None:
    stopped: list[bool] = []
    with pytest.raises(error, match="within"), alongside(lambda stop: stopped.append(stop.wait(10))):
        raise error("within")
    assert stopped == [True]


def test_work_that_does_not_stop_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    began, over = time.monotonic(), threading.Event()
    with pytest.raises(ValueError, match="within"), alongside(lambda stop: over.wait(30)):
        raise ValueError("within")
    assert time.monotonic() - began < 10
    over.set()
