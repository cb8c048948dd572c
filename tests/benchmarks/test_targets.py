"""The search for a β that is as fast as a plan for a target."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from targets import ALIKE, TRIES, alike


def prune(beta):
    return SimpleNamespace(beta=beta)


def test_a_β_that_is_as_fast_is_found():
    made, times = alike(prune, 0.3, (1000.0, 770.0), lambda made: (1000.0, 1000 * (1 - 0.5 * made.beta - 0.1)))
    assert times == (1000.0, pytest.approx(770, rel=ALIKE))
    assert made.beta == pytest.approx(0.26, abs=0.04)


def test_else_the_nearest_of_those_that_were_tried():
    """Of a runtime that rounds widths up, so that times come in steps."""
    tried = []

    def timed(made):
        tried.append(made.beta)
        return 1000.0, 700.0 if made.beta > 0.3 else 900.0

    made, times = alike(prune, 0.3, (1000.0, 770.0), timed)
    assert len(tried) == TRIES
    assert times[1] == 700
    assert made.beta > 0.3
