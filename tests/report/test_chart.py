"""Curves are drawn to scale whatever the numbers are."""

import math

from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.report.chart import BOTTOM, LEFT, MAX_POINTS, RIGHT, ROW, TOP, charts, dots, draw, ticks

finite = st.floats(-1e9, 1e9)


@given(st.lists(finite, min_size=2, max_size=500))
def test_every_point_lies_in_the_frame(values: list[float]) -> None:
    chart = draw("loss", "", range(1, len(values) + 1), values)
    assert chart is not None
    points = [tuple(map(float, point.split(","))) for point in chart.points.split()]
    assert len(points) <= MAX_POINTS
    assert all(LEFT <= x <= RIGHT and TOP - 0.1 <= y <= BOTTOM + 0.1 for x, y in points)


@given(finite, finite)
def test_ticks_enclose_the_range_in_even_steps(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    marks = ticks(low, high, count=4)
    slack = (abs(low) + abs(high)) * 1e-6 + 1e-9
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert 2 <= len(marks) <= 8


def test_a_higher_loss_is_higher_on_the_page() -> None:
    chart = draw("loss", "", [1, 2, 3], [3.0, 2.0, 1.0])
    assert chart is not None
    heights = [float(point.split(",")[1]) for point in chart.points.split()]
    assert heights == sorted(heights)
    assert (chart.first, chart.last) == ("3", "1")


def test_a_number_too_small_for_the_scale_is_zero() -> None:
    chart = draw("margin", "", [1, 2, 3], [-3.8e-7, 8.1234, 16.0])
    assert chart is not None
    assert (chart.first, chart.last) == ("0", "16")


def test_values_that_are_not_numbers_are_left_out_and_told() -> None:
    chart = draw("loss", "", [1, 2, 3, 4], [1.0, math.nan, math.inf, 0.5])
    assert chart is not None
    assert chart.left_out == 2


def test_a_curve_needs_two_steps() -> None:
    assert charts({"sft": [{"step": 1, "loss": 1.0}], "dpo": []}) == []


def test_dots_have_their_intervals_and_leave_out_what_is_absent() -> None:
    drawn = dots("t", [("a", 0.5, 0.4, 0.6), ("b", None, None, None), ("c", 0.9, None, math.nan)])
    assert drawn is not None
    (_, a, dot, low, high, value), (y, c, only, *ends, _) = drawn.rows
    assert (a, c, value) == ("a", "c", "0.5")
    assert low < dot < high < only
    assert ends == [only, only]
    assert y > ROW * 2
    assert drawn.x_ticks[0][0] <= low
    assert drawn.x_ticks[-1][0] >= only
    assert dots("t", [("a", None, None, None), ("b", math.nan, 0.1, 0.2)]) is None
