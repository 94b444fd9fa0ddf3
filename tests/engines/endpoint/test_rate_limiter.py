"""The budget of requests and tokens a minute that all replicas share."""

import pytest

from vpo_ray.engines.endpoint.rate_limiter import RateLimiter, retry_after


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_spread_over_the_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    assert [limiter.reserve(0, (60, None)) for _ in range(4)] == [0, 1, 2, 3]
    clock.now += 10
    assert [limiter.reserve(0, (60, None)) for _ in range(3)] == [0, 1, 2], "an idle time saves nothing up"


def test_tokens_are_spread_and_what_was_not_used_is_given_back() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    assert [limiter.reserve(100, (None, 6000)) for _ in range(3)] == [0, 1, 2]
    limiter.refund(50, 6000)
    assert limiter.reserve(100, (None, 6000)) == 2.5
    limiter.refund(-100, 6000)
    assert limiter.reserve(100, (None, 6000)) == 4.5


def test_the_tighter_limit_counts_and_no_question_is_too_large() -> None:
    limiter = RateLimiter(Clock())
    assert [limiter.reserve(1000, (60, 600)) for _ in range(3)] == [0, 100, 200]
    assert RateLimiter(Clock()).reserve(10**9, (60, 600)) == 0


def test_a_pause_holds_everyone() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    limiter.pause(7)
    limiter.pause(3)
    assert [limiter.reserve(1, (None, None)) for _ in range(2)] == [7, 7]
    clock.now += 8
    assert limiter.reserve(1, (None, None)) == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Rate limit reached for gpt-4o. Please try again in 20s.", 20),
        ("Please try again in 250ms. Visit", 0.25),
        ("Please try again in 1m2.5s.", 62.5),
        ("try again in 6m0s", 360),
        ('"retryDelay": "36.5s"', 36.5),
        ("Please retry after 20 seconds.", 20),
        ("Try again in 2 minutes", 120),
        ("try again in a moment", None),
        ("try again in 3 months", None),
        ("slow down", None),
    ],
)
def test_the_pause_that_an_error_names(text: str, seconds: float | None) -> None:
    assert retry_after({}, text) == seconds
    assert retry_after({"retry-after": "7"}, text) == 7
