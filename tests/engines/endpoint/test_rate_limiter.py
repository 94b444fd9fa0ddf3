"""The budget of requests and tokens a minute that all replicas share."""

from vpo_ray.engines.endpoint.client import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_spread_over_the_minute() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert [pace.reserve(0, (60, None)) for _ in range(4)] == [0, 1, 2, 3]
    clock.now += 10
    assert [pace.reserve(0, (60, None)) for _ in range(3)] == [0, 1, 2], "an idle time saves nothing up"


def test_tokens_are_spread_and_what_was_not_used_is_given_back() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert [pace.reserve(100, (None, 6000)) for _ in range(3)] == [0, 1, 2]
    pace.settle(50, 6000)
    assert pace.reserve(100, (None, 6000)) == 2.5
    pace.settle(-100, 6000)
    assert pace.reserve(100, (None, 6000)) == 4.5


def test_the_tighter_limit_counts_and_no_question_is_too_large() -> None:
    pace = Pace(Clock())
    assert [pace.reserve(1000, (60, 600)) for _ in range(3)] == [0, 100, 200]
    assert Pace(Clock()).reserve(10**9, (60, 600)) == 0


def test_a_pause_holds_everyone() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.pause(7)
    pace.pause(3)
    assert [pace.reserve(1, (None, None)) for _ in range(2)] == [7, 7]
    clock.now += 8
    assert pace.reserve(1, (None, None)) == 0
