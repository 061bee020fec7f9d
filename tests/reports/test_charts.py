"""Axes fit any data, and place values correctly."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anybit.reports.charts import LONGEST, MOST_NAMES, Chart, Point, Series, linear_axis, loss_axis, names_axis, short, upside_down

anything = st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30), min_size=1, max_size=20)
usual = st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=20)
few = settings(max_examples=300, deadline=None)


@few
@given(anything, st.sampled_from([linear_axis, loss_axis]))
@example([1.7e308, -1.7e308], linear_axis)
@example([5e-324, 1e308], loss_axis)
@example([0.0], linear_axis)
def test_axis_has_few_ticks_with_distinct_labels(values, fitted):
    axis = fitted("loss", [*values, None])
    assert math.isfinite(axis.low) and math.isfinite(axis.high) and axis.low < axis.high
    assert len(axis.ticks) <= 12 and all(-0.01 <= axis.place(tick) <= 100.01 for tick, _ in axis.ticks)
    assert all(math.isfinite(axis.place(value)) for value in values if abs(value) < 1e300 and axis.can_show(value))


@few
@given(usual, st.sampled_from([linear_axis, loss_axis]))
def test_axis_spans_its_data(values, fitted):
    axis = fitted("loss", values)
    places = [axis.place(value) for value in values]
    assert all(0 <= place <= 100 for place in places)
    if max(values) > 1.001 * min(values):
        assert min(places) == pytest.approx(100 * 0.04 / 1.08, abs=0.02) and max(places) == pytest.approx(100 * 1.04 / 1.08, abs=0.02)
        assert [text for _, text in axis.ticks] == list(dict.fromkeys(text for _, text in axis.ticks))
        assert len(axis.ticks) >= 2


@few
@given(usual)
def test_losses_over_many_decades_have_a_logarithmic_axis(values):
    axis = loss_axis("loss", values)
    assert axis.is_log == (max(values) > 20 * min(values))
    if axis.is_log:
        assert not axis.can_show(0.0) and not axis.can_show(-1.0) and not axis.can_show(None)
        middle = math.sqrt(min(values) * max(values))
        assert axis.place(middle) == pytest.approx(50, abs=0.1)


@given(st.lists(st.text(max_size=40), max_size=200))
def test_axis_shows_only_as_many_names_as_are_legible(names):
    axis = names_axis(names)
    assert len(axis.ticks) <= MOST_NAMES
    assert all(text == short(names[int(at)]) and len(text) <= LONGEST and names[int(at)].endswith(text[1:]) for at, text in axis.ticks)
    turned = upside_down(axis)
    assert all(turned.place(at) == pytest.approx(100 - axis.place(at), abs=0.011) for at, _ in axis.ticks)


def test_line_has_gaps_where_nothing_was_measured():
    line = Series("loss", 0, [Point(x, y, "") for x, y in enumerate([1.0, 2.0, None, 3.0, None, 1.0, 2.0, 3.0])], dash="solid")
    chart = Chart("key", "label", linear_axis("step", range(8)), linear_axis("loss", [1, 3]), [line])
    assert [len(piece.split()) for piece in chart.lines(line)] == [2, 3]
    assert len(list(chart.marks(line))) == 6
