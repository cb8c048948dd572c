"""Figures and their protocols, of tiny models."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import tiny_model

from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.errors import UserError
from selfpruner_hub.evaluation.figures import ANSWERED, KEPT, question_figures, task_figures, text_figures
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.evaluation.tasks import TaskScore

WINDOWS = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))
CORPUS = Corpus.of("text.txt", WINDOWS)


def test_of_a_text():
    dense, other = tiny_model("llama"), tiny_model("llama", seed=1)
    teacher = teach(dense, WINDOWS)
    found = text_figures(other, CORPUS, teacher)
    assert found["perplexity (32)"].value == pytest.approx(perplexity(other, WINDOWS), abs=1e-3)
    assert found["KL (32)"].value == pytest.approx(divergence(other, WINDOWS, teacher), abs=1e-4)
    assert "4 consecutive windows of 32 tokens" in found["KL (32)"].protocol
    assert CORPUS.sha256[:12] in found["KL (32)"].protocol
    assert list(text_figures(other, CORPUS)) == ["perplexity (32)"]
    assert text_figures(dense, CORPUS, teacher)["KL (32)"].value == pytest.approx(0, abs=1e-4)


def test_a_perplexity_without_bound_is_refused():
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not a number"):
        text_figures(model, CORPUS)


def test_of_questions():
    right, dense = [True, False, True, False], [True, True, False, False]
    found = question_figures(tiny_model("llama"), right, "report", dense)
    assert (found[ANSWERED].value, found[KEPT].value) == (0.5, 0.5)
    assert found[ANSWERED].protocol.startswith(f"4 questions, ± {math.sqrt(0.25 / 4):.4f}; half 'report'")
    assert found[KEPT].protocol.startswith("2 questions that the dense model answers rightly, ± ")
    assert list(question_figures(tiny_model("llama"), right, "report")) == [ANSWERED]
    assert list(question_figures(tiny_model("llama"), right, "report", [False] * 4)) == [ANSWERED]  # nothing to keep


def test_of_tasks():
    score = TaskScore("ifeval", 5, "google/IFEval", "0.4", {"acc": 0.25}, {"acc": 0.1}, chat=True)
    metric = task_figures(tiny_model("llama"), [score], limited=True)["acc (ifeval)"]
    assert (metric.value, metric.dataset) == (0.25, "google/IFEval")
    assert metric.protocol == (
        "zero-shot, first 5 items, ± 0.1000, through the chat template, float32, lm-evaluation-harness 0.4"
    )
