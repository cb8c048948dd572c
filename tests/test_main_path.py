"""What `AutoPruner.prune` makes: the same as its stages by hand, each with its own text, and what was found is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner
from selfpruner_hub.calibration.fisher import output_fisher
from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.calibration.texts import Texts
from selfpruner_hub.models.architectures import decoder_layers, shape_of
from selfpruner_hub.pruning.importance import rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.output_repair import first_repairs
from selfpruner_hub.pruning.prepare import prepared
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import Slicer, slice_model
from selfpruner_hub.pruning.temperature import match_confidence
from selfpruner_hub.search.journal import JOURNAL_FILE, read_journal
from selfpruner_hub.search.journal_lines import ScoreLine
from selfpruner_hub.settings import resolve
from selfpruner_hub.storage.run import DEFAULT_RUN

TEXT = ["".join(np.random.default_rng(seed).choice(list("abcdefgh "), 600)) for seed in range(8)]
SMALL = {"window": 32, "calibration_tokens": 2048, "fitness_tokens": 256, "fisher_tokens": 1024}
CASES = {
    "default": {},
    "no second repair": {"repair": "output"},
    "no repair": {"repair": "none"},
    "outputs alone": {"repair": "sequential"},
    "no confidence": {"confidence": False},
    "no Fisher information": {"repair": "output", "importance": "energy", "seeds": ("uniform",)},
}


def prune(**settings):
    model = tiny_model("llama")
    return AutoPruner(model, tiny_tokenizer(), "tests/llama").prune(
        0.3, data=TEXT, progress=False, **SMALL, **settings
    ), model


@pytest.fixture(scope="module")
def texts():
    """The texts of a run."""
    return Texts(tiny_model("llama"), tiny_tokenizer()).read(TEXT, resolve(None, **SMALL), DEFAULT_RUN)


def by_hand(plan, texts, settings):
    """The pruned model of a plan, and its logit scale, by the stages that the settings ask for."""
    model, windows = tiny_model("llama"), texts.calibration.windows
    fisher = output_fisher(model, windows[: settings.fisher_tokens // settings.window])
    fisher = None if settings.importance == "energy" else fisher
    statistics = calibrate(model, windows)
    order = rank(model, statistics, settings.importance, fisher)
    repairs = first_repairs(model, order, statistics) if settings.repair != "none" else None
    with ordered(model, order):
        pruned = slice_model(Slicer(model, repairs), plan)
    if settings.repair in ("sequential", "full"):
        compensate(model, pruned, windows, inputs=settings.repair == "full", fisher=fisher)
    return pruned, match_confidence(model, pruned, texts.search.windows) if settings.confidence else 1.0


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_result_is_that_of_the_stages(changes, texts):
    pruned, _ = prune(**changes)
    expected, scale = by_hand(pruned.plan, texts, resolve(None, **SMALL, **changes))
    for (name, one), other in zip(pruned.model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
    assert pruned.report.metrics["search_logit_scale"].value == pytest.approx(scale, rel=1e-5)


def test_the_record_names_the_texts(texts):
    record = prune(repair="output")[0].report
    hashes = {name: record.data[name]["sha256"] for name in ("calibration", "fitness")}
    assert hashes == {"calibration": texts.calibration.sha256, "fitness": texts.search.sha256}
    assert hashes["calibration"] != hashes["fitness"]
    assert record.method["fisher_tokens"] == SMALL["fisher_tokens"]


def test_the_predicted_losses_are_those_of_the_fisher_information(texts):
    model, settings, windows = tiny_model("llama"), resolve(None, **SMALL), texts.calibration.windows
    fisher, statistics = output_fisher(model, windows[:8]), calibrate(model, windows)
    order = rank(model, statistics, fisher=fisher)
    expected = Slicer(model, first_repairs(model, order, statistics, fisher)).loss_curves()
    with prepared(model, windows, settings, fisher) as ready:
        for one, other in zip(ready.curves, expected, strict=True):
            assert one.attention == pytest.approx(other.attention)
            assert one.ffn == pytest.approx(other.ffn)
    with prepared(model, windows, settings) as ready:
        assert ready.curves is None


def test_the_best_plan_of_the_search_is_cut(tmp_path):
    pruned, _ = prune(
        repair="output", seeds=("uniform",), multiple_of=1, proposer="evolution", evaluations=12, run_dir=tmp_path
    )
    scores = [line for line in read_journal(tmp_path / JOURNAL_FILE)[1] if isinstance(line, ScoreLine)]
    best = min((line for line in scores if line.share == 1), key=lambda line: line.fitness)
    assert shape_of(pruned.model.config).dense == pruned.plan == best.plan
    assert not best.origin.startswith("seed")


@pytest.mark.parametrize("refit", [True, False])
def test_gate_and_up_are_refitted_where_that_is_asked_for(refit):
    """Without it, their rows are rows of the dense model's."""
    pruned, model = prune(repair="full" if refit else "sequential")
    unchanged = []
    for layer, dense in zip(decoder_layers(pruned.model), decoder_layers(model), strict=True):
        for name in ("gate_proj", "up_proj"):
            rows, theirs = (getattr(each.mlp, name).weight.detach() for each in (layer, dense))
            unchanged.append(all((row == theirs).all(1).any() for row in rows))
    assert all(unchanged) != refit
