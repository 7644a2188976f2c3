"""Bars of `cdistill eval compare`'s page."""

import re

import pytest

from cdistill.analysis import charts


def test_bars_are_as_long_as_their_values():
    bars = [
        charts.Bar("a", "#111111", 0.25, 0.0),
        charts.Bar("b", "#222222", 1.0, 0.1),
        charts.Bar("c", "#333333", 0.5, 0.1),
    ]
    chart = charts.bar_chart({"x": bars}, label="bars")
    a, b, c = (float(re.search(rf'width="([\d.]+)"[^>]*fill="{bar.colour}"', chart)[1]) for bar in bars)
    assert (a / b, c / b) == pytest.approx((0.25, 0.5), abs=1e-3)
