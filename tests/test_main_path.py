"""How the stages of the main path hang together: what each is given is what the stage before it made."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import pruner
from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.plans.budget import Rates
from selfpruner_hub.pruning import prepare

STAGES = {
    **dict.fromkeys(("output_fisher", "calibrate", "rank", "Slicer"), prepare),
    **dict.fromkeys(("find_plan", "slice_model", "compensate", "match_confidence"), pruner),
}
"""In their order, and the module that calls each."""


class Call:
    """A stage as it was called: its arguments by name, and what it gave back."""

    def __init__(self, name, arguments, result):
        self.name, self.arguments, self.result = name, arguments, result

    def __getitem__(self, argument):
        return self.arguments[argument]


def prune(**settings):
    """Prune a tiny model, and give back the pruned model, the dense one, and the stages that were called, by name."""
    calls = []

    def watched(stage, name):
        def spy(*args, **kwargs):
            bound = inspect.signature(stage).bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append(Call(name, bound.arguments, stage(*args, **kwargs)))
            return calls[-1].result

        return spy

    model = tiny_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in STAGES.items():
            patch.setattr(module, name, watched(getattr(module, name), name))
        made = pruner.AutoPruner(model, tiny_tokenizer(), "tests/llama").prune(
            0.3, data="self", proposer="evolution", window=32, calibration_tokens=2048, fitness_tokens=256,
            fisher_tokens=1024, evaluations=0, progress=False, **settings,
        )  # fmt: skip
    return made, model, {call.name: call for call in calls}, [call.name for call in calls]


@pytest.fixture(scope="module")
def default():
    """By the default settings."""
    return prune()


def sha256(windows):
    return Corpus.of("", windows).sha256


def test_every_stage_runs_once_in_its_order(default):
    assert default[3] == list(STAGES)


@pytest.mark.parametrize("stage", ["rank", "Slicer", "compensate"])
def test_order_slicer_and_second_repair_get_the_fisher_information(stage, default):
    _, _, calls, _ = default
    given, found = calls[stage]["fisher"], calls["output_fisher"].result
    assert len(given) == len(found) == 4
    for one, two in zip(given, found, strict=True):
        assert one[0] is two[0]  # of the attention's output
        assert one[1] is two[1]  # of the FFN's
    assert not torch.equal(found[0][0], found[0][1])


def test_search_and_cut_are_by_the_slicer_that_knows_the_statistics(default):
    _, _, calls, _ = default
    slicer, ready = calls["Slicer"].result, calls["find_plan"]["ready"]
    assert calls["Slicer"]["order"] is calls["rank"].result
    assert ready.slicer is calls["slice_model"]["slicer"] is slicer
    assert slicer.repairs


def test_the_predicted_losses_are_those_of_the_fisher_information(default):
    """Half of the errors of that slicer, and nothing where nobody reads them."""
    _, _, calls, _ = default
    for curves, errors in zip(calls["find_plan"]["ready"].curves, calls["Slicer"].result.errors(), strict=True):
        for curve, error in zip((curves.attention, curves.ffn), errors, strict=True):
            assert curve == pytest.approx(error.double().numpy() / 2)
    _, _, calls, _ = prune(repair="output", importance="energy", seeds=("uniform",))
    assert calls["find_plan"]["ready"].curves is None


def test_the_plan_that_was_found_is_cut(default):
    made, _, calls, _ = default
    assert calls["slice_model"]["plan"] == calls["find_plan"].result.outcome.best.plan == made.plan


def test_the_plan_that_was_found_is_cut_though_a_seed_is_another(monkeypatch):
    find = pruner.find_plan

    @functools.wraps(find)
    def search(proposer, budget, *stages):
        found = find(proposer, budget, *stages)
        seed = replace(found.outcome.best, plan=budget.project(Rates.tied((0.6, 0.1, 0.4, 0.1))))
        return replace(found, outcome=replace(found.outcome, best_seed=seed))

    monkeypatch.setattr(pruner, "find_plan", search)
    made, _, calls, _ = prune(repair="output")
    outcome = calls["find_plan"].result.outcome
    assert calls["slice_model"]["plan"] == made.plan == outcome.best.plan != outcome.best_seed.plan


def test_each_stage_reads_its_text(default):
    """Statistics, Fisher information and second repair the calibration; the confidence what they were not fitted to."""
    made, _, calls, _ = default
    data = {text: made.report.data[text]["sha256"] for text in ("calibration", "fitness")}
    assert data["calibration"] != data["fitness"]
    for stage in ("calibrate", "compensate"):
        assert sha256(calls[stage]["windows"]) == data["calibration"]
    assert sha256(calls["match_confidence"]["windows"]) == data["fitness"]
    few = calls["output_fisher"]["windows"]
    assert few.numel() == made.report.method["fisher_tokens"]
    assert torch.equal(few, calls["calibrate"]["windows"][: len(few)])


def test_the_second_repair_and_the_confidence_change_the_pruned_model(default):
    made, model, calls, _ = default
    for stage in ("compensate", "match_confidence"):
        assert calls[stage]["dense"] is model
        assert calls[stage]["pruned"] is made.model
    assert calls["compensate"]["inputs"] is True
    assert made.report.metrics["search_logit_scale"].value == calls["match_confidence"].result


@pytest.mark.parametrize("refit", [True, False])
def test_gate_and_up_are_refitted_where_that_is_asked_for(refit):
    """Without it, their rows are rows of the dense model's."""
    made, model, _, _ = prune(repair="full" if refit else "sequential")
    taken = []
    for layer, dense in zip(decoder_layers(made.model), decoder_layers(model), strict=True):
        for name in ("gate_proj", "up_proj"):
            rows, theirs = (getattr(each.mlp, name).weight.detach() for each in (layer, dense))
            taken.append(all((row == theirs).all(1).any() for row in rows))
    assert all(taken) != refit


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"repair": "output"}, {"compensate"}),
        ({"repair": "none"}, {"compensate"}),
        ({"confidence": False}, {"match_confidence"}),
        (
            {"repair": "output", "importance": "energy", "seeds": ("uniform",)},
            {"compensate", "output_fisher"},
        ),
    ],
    ids=["one repair", "no repair", "no confidence", "no fisher information"],
)
def test_a_stage_that_nothing_asks_for_is_left_out(settings, left_out):
    assert set(prune(**settings)[3]) == set(STAGES) - left_out


def test_without_a_repair_nothing_is_repaired():
    _, _, calls, _ = prune(repair="none")
    assert calls["slice_model"]["slicer"].repairs is None
