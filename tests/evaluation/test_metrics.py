"""Chunked losses equal the plain ones, and a candidate's score that of its sliced model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.tiny import DISTINCT, tiny_model

import selfpruner_hub.models.forward as forward
from selfpruner_hub import ranks
from selfpruner_hub.calibration.fisher import output_fisher
from selfpruner_hub.calibration.generated_text import continuations
from selfpruner_hub.errors import UserError
from selfpruner_hub.evaluation.fitness import Fitness, SecondRepairScore
from selfpruner_hub.evaluation.metrics import (
    cross_entropy,
    divergence,
    following,
    label_loss,
    mean_losses,
    miss_loss,
    perplexity,
    teach,
    teacher_loss,
)
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import LossCurves
from selfpruner_hub.pruning.prepare import prepared
from selfpruner_hub.pruning.slicing import Slicer, slice_model
from selfpruner_hub.settings import PruneSettings

WINDOWS = torch.randint(3, 128, (10, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(forward, "BATCH_TOKENS", 3 * 24)
    monkeypatch.setattr(forward, "HEAD_TOKENS", 7)


@pytest.mark.parametrize("name", DISTINCT)
def test_cross_entropy_equals_transformers_loss(name):
    model = tiny_model(name)
    with torch.no_grad():
        expected = model(WINDOWS, labels=WINDOWS).loss.item()
    assert cross_entropy(model, WINDOWS) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, WINDOWS) == pytest.approx(math.exp(expected), rel=1e-4)


def test_divergence_with_all_outcomes_is_the_full_one():
    dense, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.no_grad():
        p, q = (m(WINDOWS).logits[:, :-1].log_softmax(-1) for m in (dense, other))
    full = (p.exp() * (p - q)).sum(-1).mean().item()
    assert divergence(other, WINDOWS, teach(dense, WINDOWS, top_k=128)) == pytest.approx(full, rel=1e-3)
    assert 0 < divergence(other, WINDOWS, teach(dense, WINDOWS, top_k=16)) < full
    assert divergence(dense, WINDOWS, teach(dense, WINDOWS)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_fitness_is_the_figure_of_the_sliced_model(metric):
    model = tiny_model("qwen2")
    teacher = teach(model, WINDOWS)
    with prepared(model, WINDOWS, PruneSettings()) as ready:
        slicer = ready.slicer
        plan = Budget(slicer.shape, 0.3).project(Rates((0.3,) * 4, (0.1, 0.2, 0.3, 0.4)))
        fitness = Fitness(slicer, WINDOWS, metric)
        sliced = slice_model(slicer, plan)
        scores = fitness(plan), fitness(plan, 0.3)
    figures = [
        divergence(sliced, w, teacher) if metric == "kl" else perplexity(sliced, w) for w in (WINDOWS, WINDOWS[:3])
    ]
    assert scores == pytest.approx(figures, rel=1e-4)
    assert model.model.layers[0].mlp.up_proj.weight.shape[0] == 48  # the dense layers are back


def test_a_plan_is_run_once_for_each_share_of_the_windows(monkeypatch):
    model = tiny_model("llama")
    with prepared(model, WINDOWS, PruneSettings()) as ready:
        slicer, cut = ready.slicer, Plan.of([48, 40, 32, 48], [1, 2, 2, 2])
        fitness, ran, layers = Fitness(slicer, WINDOWS), [], slicer.layers
        monkeypatch.setattr(slicer, "layers", lambda plan: ran.append(plan) or layers(plan))
        first, whole = fitness(cut, 0.3), fitness(cut)
        assert (fitness.loss(cut, 0.3), fitness(Plan.of([48, 40, 32, 48], [1, 2, 2, 2]))) == (first, whole)
        assert fitness(slicer.shape.dense) != whole
    assert ran == [cut, cut, slicer.shape.dense]


def test_a_score_is_of_the_windows_of_all_processes(monkeypatch):
    """The last of four reads one window of the first four, and one of all six: another process reads more of all."""
    monkeypatch.setattr(ranks, "count", lambda: 4)
    monkeypatch.setattr(ranks, "rank", lambda: 3)
    agreed = []
    monkeypatch.setattr(ranks, "mean", lambda value, weight: agreed.append(weight) or value)
    monkeypatch.setattr(ranks, "from_owner", lambda _index, make, _like: make())
    model = tiny_model("llama")
    fitness = Fitness(Slicer(model), WINDOWS[:6])
    dense = fitness._slicer.shape.dense
    assert fitness(dense, 0.25) == fitness(dense, 0.25) == fitness(dense)
    assert agreed == [1, 1]


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_the_loss_of_a_plan_is_in_nats_over_the_dense_model(metric):
    model = tiny_model("qwen2")
    with prepared(model, WINDOWS, PruneSettings()) as ready:
        slicer = ready.slicer
        cut, fitness = Plan.of([48, 40, 32, 48], [1, 2, 2, 2]), Fitness(slicer, WINDOWS, metric)
        assert fitness.loss(slicer.shape.dense) == pytest.approx(0, abs=1e-5)
        if metric == "kl":
            assert fitness.loss(cut, 0.3) == fitness(cut, 0.3)
        else:
            assert fitness.loss(cut) == pytest.approx(math.log(fitness(cut) / perplexity(model, WINDOWS)))


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_what_the_second_repair_takes_away_is_left_out(metric):
    """Of the loss in nats, what it is more than the sum of the layers' predicted ones counts as told."""
    model = tiny_model("qwen2")
    with prepared(model, WINDOWS, PruneSettings(), output_fisher(model, WINDOWS)) as ready:
        slicer, curves = ready.slicer, ready.curves
        cut = Plan.of([48, 40, 32, 48], [1, 4, 4, 4])
        alone = curves[0].attention[1] + curves[1].ffn[40] + curves[2].ffn[32]
        measured = Fitness(slicer, WINDOWS, metric).loss(cut, 0.5)
        for remains in (0, 0.25, 1):
            fitness = SecondRepairScore(Fitness(slicer, WINDOWS, metric), curves, remains)
            assert fitness.loss(cut, 0.5) == pytest.approx(alone + remains * (measured - alone), rel=1e-5)
            assert fitness.loss(slicer.shape.dense) == pytest.approx(0, abs=1e-5)


def test_a_broken_candidate_scores_infinity():
    model = tiny_model("llama")
    with prepared(model, WINDOWS, PruneSettings()) as ready:
        slicer = ready.slicer
        fitness = Fitness(slicer, WINDOWS, "perplexity")
        free = [LossCurves(np.zeros(5), np.zeros(49))] * 4  # no width costs anything
        score = SecondRepairScore(fitness, free)
        model.model.norm.weight.data[0] = torch.nan
        assert fitness(slicer.shape.dense) == score(slicer.shape.dense) == math.inf


def test_unknown_metric_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="kl, perplexity"):
        Fitness(Slicer(model), WINDOWS, "accuracy")


LENGTHS = [24, 5, 17, 2, 9, 24, 12, 3, 20, 7]


def counted_of(lengths, start=1):
    """Predictions from the token `start` on, without those of what pads a window."""
    places = torch.arange(1, WINDOWS.shape[1])
    return torch.stack([(places >= start) & (places < length) for length in lengths])


def test_what_follows_is_what_counts():
    assert torch.equal(following(WINDOWS), WINDOWS[:, 1:].flatten())
    few = following(WINDOWS, counted_of(LENGTHS))
    assert torch.equal(few, torch.cat([row[1:n] for row, n in zip(WINDOWS, LENGTHS, strict=True)]))


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_padded_windows_give_the_figures_of_each_on_its_own(name, start):
    dense, other = tiny_model(name), tiny_model(name, seed=1)
    counted = counted_of(LENGTHS, start)
    losses = (
        label_loss(WINDOWS, counted), miss_loss(WINDOWS, counted),
        teacher_loss(teach(dense, WINDOWS, counted=counted)),
    )  # fmt: skip
    found = mean_losses(other, WINDOWS, *losses, counted=counted)
    totals = torch.zeros(3)
    for row, length in zip(WINDOWS, LENGTHS, strict=True):
        if length > start:
            alone = row[None, :length]
            with torch.no_grad():
                p, q = (m(alone).logits[0, start - 1 : -1].log_softmax(-1) for m in (dense, other))
            top = p.topk(64).indices
            inside = [(x.gather(1, top), (1 - x.gather(1, top).exp().sum(1)).log()) for x in (p, q)]
            (p_top, p_rest), (q_top, q_rest) = inside
            kl = (p_top.exp() * (p_top - q_top)).sum(1) + p_rest.exp() * (p_rest - q_rest)
            wanted = alone[0, start:]
            likely = q.gather(1, wanted[:, None])
            totals += torch.stack([-likely.sum(), (q.argmax(1) != wanted).sum().float(), kl.sum()])
    assert found == pytest.approx((totals / counted.sum()).tolist(), rel=1e-3)
    assert 0.5 < found[1] <= 1


def test_all_that_counts_is_all():
    model = tiny_model("llama")
    everything = torch.ones(10, 23, dtype=torch.bool)
    with_all, without = (
        mean_losses(model, WINDOWS, label_loss(WINDOWS, c), miss_loss(WINDOWS, c), counted=c)
        for c in (everything, None)
    )
    assert with_all == without
    assert without[0] == pytest.approx(cross_entropy(model, WINDOWS))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_model_misses_none_of_its_own_likeliest_tokens(name):
    model, other = tiny_model(name), tiny_model(name, seed=1)
    answers = continuations(model, WINDOWS[:, :8].tolist(), 16, temperature=0)
    windows = torch.cat([WINDOWS[:, :8], torch.tensor(answers)], 1)
    counted = torch.zeros(10, 23, dtype=torch.bool)
    counted[:, 7:] = True
    for measured, least, most in ((model, 0, 0), (other, 0.5, 1)):
        (found,) = mean_losses(measured, windows, miss_loss(windows, counted), counted=counted)
        assert least <= found <= most
    counted[:, 6] = True  # the last token of the prompt is not the model's
    (found,) = mean_losses(model, windows, miss_loss(windows, counted), counted=counted)
    assert 0 < found <= 1 / 17
