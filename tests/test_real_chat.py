"""What is left of the real chat model's answers after pruning: a floor, so that it never breaks silently again."""

from __future__ import annotations

import pytest

from selfpruner_hub.evaluation.chat import ChatMeasure
from selfpruner_hub.evaluation.questions import load_questions, rightly_answered
from selfpruner_hub.pruned_model import PrunedModel

pytestmark = pytest.mark.slow
AGREEMENT, KL, KEPT = 0.55, 0.8, 0.12
"""Bounds, far from the 0.67, 0.59 and 0.40 that it had on one machine; on another one, other text is written."""
QUESTIONS = load_questions("develop")[:100]


@pytest.fixture(scope="module")
def pruned(real_pruned):
    return PrunedModel.from_pretrained(real_pruned / "model", dtype="auto")


def test_it_agrees_with_its_parent_where_that_answers(real_pruner, pruned):
    measure = ChatMeasure(real_pruner.model, real_pruner.tokenizer, 5)
    dense, left = measure(real_pruner.model), measure(pruned.model)
    assert dense.agreement > 0.97  # rounding alone
    assert left.agreement > AGREEMENT
    assert left.kl < KL


def test_it_answers_plain_questions(real_pruner, pruned):
    dense, left = (rightly_answered(m, real_pruner.tokenizer, QUESTIONS) for m in (real_pruner.model, pruned.model))
    assert sum(dense) > 40
    kept = sum(own for own, theirs in zip(left, dense, strict=True) if theirs) / sum(dense)
    assert kept > KEPT
