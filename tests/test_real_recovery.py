"""Recovery of the real model, of all weights and by adapters: nearer to its parent on conversations it has not seen."""

from __future__ import annotations

import os

import pytest

from selfpruner_hub.evaluation.chat import ChatMeasure
from selfpruner_hub.pruned_model import PrunedModel

pytestmark = pytest.mark.slow
SHORT = {"data": "chat", "tokens": 16_384, "window": 128, "batch_tokens": 1024}
"""Two minutes of recovery: after one, what is gained hangs on the text that this machine wrote."""
METHODS = ("full", *(["lora"] if os.environ.get("SELFPRUNER_THOROUGH") else []))
LEFT = 0.99
"""Most that may be left of the divergence before."""


@pytest.fixture(scope="module")
def measure(real_pruner):
    return ChatMeasure(real_pruner.model, real_pruner.tokenizer, 6)


@pytest.mark.parametrize("method", METHODS)
def test_two_minutes_bring_it_nearer_to_its_parent(method, real_pruner, real_pruned, measure, tmp_path):
    pruned = PrunedModel.from_pretrained(real_pruned / "model", dtype="auto")
    before = measure(pruned.model)
    better = pruned.recover(real_pruner.model, method=method, **SHORT)
    after = measure(better.model)
    assert after.kl < LEFT * before.kl
    assert better.report.recovery["method"] == method
    better.save_pretrained(tmp_path / "better")
    assert measure(PrunedModel.from_pretrained(tmp_path / "better", dtype="auto").model) == after
