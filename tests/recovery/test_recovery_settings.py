"""Settings of recovery: what is refused, and the learning rate."""

from __future__ import annotations

import re

import pytest

from selfpruner_hub.errors import UserError
from selfpruner_hub.recovery.settings import RecoveryBudget, RecoverySettings, resolve_recovery


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"speed": 1}, "Unknown recovery setting speed. Known: method, rank"),
        ({"method": "prompt"}, "Choose from: auto, full, lora"),
        ({"rank": 0}, "rank must be a whole number from 1"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"passes": True}, "passes must be a whole number"),
        ({"learning_rate": "high"}, "learning_rate must be a number"),
        ({"question_share": 1.5}, "question_share must be a number from 0 to 1"),
    ],
)
def test_what_is_wrong_is_said(changes, told):
    with pytest.raises(UserError, match=re.escape(told)):
        resolve_recovery(**changes)


@pytest.mark.parametrize(
    ("minutes", "tokens", "told"),
    [
        (None, None, "either minutes or tokens"),
        (1, 1, "either minutes or tokens"),
        (0, None, "minutes of recovery must be a number above 0; got 0"),
        ("ten", None, "minutes of recovery must be a number above 0; got 'ten'"),
        (None, 1.5, "tokens of recovery must be a number above 0; got 1.5"),
        (None, True, "tokens of recovery must be a number above 0; got True"),
        (float("nan"), None, "minutes of recovery"),
    ],
)
def test_a_budget_is_one_number(minutes, tokens, told):
    with pytest.raises(UserError, match=re.escape(told)):
        RecoveryBudget(minutes, tokens)


def test_larger_models_get_lower_rates():
    settings = RecoverySettings()
    assert settings.rate(30_000_000, lora=False) == settings.rate(135_000_000, lora=False) == 2e-4
    assert settings.rate(8_000_000_000, lora=False) == pytest.approx(2.6e-5, rel=0.01)
    assert settings.rate(8_000_000_000, lora=True) == pytest.approx(2.6e-4, rel=0.01)
    assert resolve_recovery(learning_rate=1e-3).rate(8_000_000_000, lora=True) == 1e-3
