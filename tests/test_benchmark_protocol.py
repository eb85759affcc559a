"""benchmarks/protocol.py: the window of learning rates."""

import math
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def protocol(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import protocol

    return protocol


def test_a_window_is_read_between_rates(protocol):
    """A loss of 1 + |log2 lr|/30 passes 1.05 at 2^1.5 and at 2^-1.5."""
    assert protocol.window(lambda lr: 1 + abs(math.log2(lr)) / 30, 1.0) == pytest.approx(8)


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_a_window_ends_at_the_last_rate_before_one_that_is_lost(protocol, lost):
    assert protocol.window(lambda lr: 1.0 if 0.2 < lr < 3 else lost, 1.0) == 8


def test_a_window_that_has_no_end_is_at_least_six_factors_a_side(protocol):
    assert protocol.window(lambda lr: 1.0, 1.0) == pytest.approx(
        2**12, rel=0.01
    )  # rates of three digits
