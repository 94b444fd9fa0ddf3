"""The budget of requests and tokens a minute that all replicas share."""

from vpo_ray.engines.endpoint.rate_limiter import RateLimiter


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
