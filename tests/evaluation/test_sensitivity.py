"""Predicted losses against measured ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny import DISTINCT, surer, tiny_model

from selfpruner_hub.calibration.fisher import output_fisher
from selfpruner_hub.evaluation.fitness import Fitness, SecondRepairScore
from selfpruner_hub.models.architectures import architecture_of, logit_scale, residual_scale
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import STEP, StepEffects
from selfpruner_hub.pruning.prepare import prepared
from selfpruner_hub.search.proposers import random_rates
from selfpruner_hub.settings import PruneSettings


def changed(plan, layer, **widths):
    layers = list(plan.layers)
    layers[layer] = replace(layers[layer], **widths)
    return Plan(tuple(layers))


def quiet_model(architecture):
    """A tiny model whose layers and logits are all small, so that what a step changes is small too."""
    model = tiny_model(architecture)
    row = architecture_of(model.config)
    for layer in model.get_decoder().layers:
        for name, parameter in layer.named_parameters():
            if name.startswith((row.attention_output, row.ffn_output)):
                parameter.data *= 0.02 / residual_scale(model.config)
            elif row.output_norms and name.startswith("post_"):
                parameter.data = 0.02 * (parameter.data + row.norm_unit) - row.norm_unit
    # With tied embeddings a random model is so sure of itself that the loss loses its digits.
    return surer(model, 0.05 / logit_scale(model.config))


@pytest.mark.parametrize("architecture", DISTINCT)
def test_slopes_predict_what_small_changes_do(architecture):
    model = quiet_model(architecture)
    windows = torch.randint(3, 128, (32, 16), generator=torch.Generator().manual_seed(0))
    with prepared(model, windows, PruneSettings(), output_fisher(model, windows)) as ready:
        slicer, curves = ready.slicer, ready.curves
        budget = Budget(slicer.shape, 0.3)
        plan = budget.project(random_rates(budget, np.random.default_rng(0)))
        fitness = Fitness(slicer, windows, "perplexity")
        found = fitness.measure_steps(plan)
        second = fitness.measure_steps(plan, curves=curves)
        lessened = SecondRepairScore(fitness, curves, 0.25).measure_steps(plan)
        base, predicted, measured = math.log(fitness(plan)), [], []
        for layer, (kept, dense) in enumerate(zip(plan.layers, slicer.shape.dense.layers, strict=True)):
            step = max(1, round(STEP * dense.intermediate_size))
            for name, width, value in (
                ("ffn_removed", "intermediate_size", kept.intermediate_size - step),
                ("ffn_restored", "intermediate_size", min(kept.intermediate_size + step, dense.intermediate_size)),
                ("attention_removed", "num_key_value_heads", kept.num_key_value_heads - 1),
                ("attention_restored", "num_key_value_heads", kept.num_key_value_heads + 1),
            ):
                possible = 0 < value <= getattr(dense, width) and value != getattr(kept, width)
                possible &= name.startswith("ffn") or not slicer.shape.whole_attention
                assert math.isfinite(getattr(found, name)[layer]) == possible
                if possible:
                    predicted.append(getattr(found, name)[layer])
                    measured.append(math.log(fitness(changed(plan, layer, **{width: value}))) - base)
    assert len(measured) > 6
    if architecture_of(model.config).output_norms:  # a norm after each output: no change of a width is small to it
        assert np.corrcoef(predicted, measured)[0, 1] > 0.5
    else:
        assert predicted == pytest.approx(measured, rel=0.1, abs=0.05 * max(map(abs, measured)))
    for layer, kept in enumerate(plan.layers):
        if math.isfinite(back := second.ffn_restored[layer]):  # what is given back costs less alone
            wide = min(kept.intermediate_size + max(1, round(STEP * 48)), 48)
            alone = curves[layer].ffn[wide] - curves[layer].ffn[kept.intermediate_size]
            assert alone < 0
            assert lessened.ffn_restored[layer] == pytest.approx(0.25 * back + 0.75 * alone, rel=1e-3, abs=1e-9)
        ahead = curves[layer].attention[kept.num_key_value_heads]
        behind = curves[layer].attention[kept.num_key_value_heads - 1]
        if math.isfinite(found.attention_removed[layer]):
            more = second.attention_removed[layer] - found.attention_removed[layer]
            assert more == pytest.approx(behind - ahead, rel=1e-3, abs=1e-9)
            wanted = 0.25 * second.attention_removed[layer] + 0.75 * (behind - ahead)
            assert lessened.attention_removed[layer] == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_step_of_an_attention_is_a_multiple():
    """In all layers, two of four KV groups are kept: with two in a step, none may go."""
    model = quiet_model("llama")
    windows = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))
    with prepared(model, windows, PruneSettings(), output_fisher(model, windows)) as ready:
        plan = ready.slicer.shape.plan([48] * 4, [2] * 4)
        found = Fitness(ready.slicer, windows, "perplexity", kv_multiple=2).measure_steps(plan)
    assert found.attention_removed == (math.inf,) * 4
    assert all(map(math.isfinite, found.attention_restored))


def test_slopes_survive_the_journal():
    slopes = StepEffects((0.25, math.inf), (-0.5, -0.125), (0.0, 1.0), (math.inf, math.inf))
    assert StepEffects.from_json(slopes.to_json()) == slopes
