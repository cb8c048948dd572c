"""What is left of the real chat model's answers after pruning: a floor, so that it never breaks silently again."""

from __future__ import annotations

import pytest

from selfpruner_hub.evaluation.chat import ChatMeasure
from selfpruner_hub.evaluation.questions import load_questions, rightly_answered

pytestmark = pytest.mark.slow
BETA = 0.2
AGREEMENT, KL, KEPT = 0.55, 0.9, 0.35
"""Bounds."""
QUESTIONS = load_questions("develop")[:100]


@pytest.fixture(scope="module")
def pruned(real_pruner):
    """With the default's text for chat models but for articles, which need the Hub, and little of it."""
    return real_pruner.prune(
        BETA, data="chat+self", shares=(3, 1), window=256, calibration_tokens=16_384, fisher_tokens=4_096,
        fitness_tokens=2_048, evaluations=0, seeds=("sensitivity",), sequential_repair=False, progress=False,
    )  # fmt: skip


def test_it_agrees_with_its_parent_where_that_answers(real_pruner, pruned):
    measure = ChatMeasure(real_pruner.model, real_pruner.tokenizer, 24)
    dense, left = measure(real_pruner.model), measure(pruned.model)
    assert dense.agreement > 0.97  # rounding alone
    assert left.agreement > AGREEMENT
    assert left.kl < KL


def test_it_answers_plain_questions(real_pruner, pruned):
    dense, left = (rightly_answered(m, real_pruner.tokenizer, QUESTIONS) for m in (real_pruner.model, pruned.model))
    assert sum(dense) > 40
    kept = sum(own for own, theirs in zip(left, dense, strict=True) if theirs) / sum(dense)
    assert kept > KEPT
