"""The comparison of proposers in the paper's setting: CMA-ES learns, runs go on where they stopped, pairs are kept."""

from __future__ import annotations

import json
from dataclasses import replace

import equal_budget
import numpy as np
import pytest
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.proposers import RandomProposer

SMALL = replace(equal_budget.PAPER, window=32, calibration_tokens=256, fitness_tokens=64, population=4)
SHORT = replace(equal_budget.SETTINGS, crossover=4, mutation=4)


@pytest.fixture(scope="module")
def pruner():
    return AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")


def found(proposer, budget, journal=None, evaluations=200.0):
    """Search for rates that fall with depth; what is reached, and every score."""
    wanted = np.linspace(0.5, 0.1, budget.shape.num_layers)
    problem = Problem(
        budget,
        equal_budget.population(budget, 0),
        lambda plan, _share: float(np.square(np.array(budget.rates(plan).ffn) - wanted).sum()),
    )
    settings = replace(equal_budget.SETTINGS, evaluations=evaluations)
    return search(proposer, problem, journal or Journal(None, {}), settings)


def test_cmaes_learns_from_the_scores(pruner):
    budget = ParameterBudget(pruner.shape, 0.3, p_min=0.1, p_max=0.9, tied=True)
    reached = {each.name: found(each, budget).best for each in (equal_budget.CmaEs(budget), RandomProposer(budget))}
    assert reached["cmaes"].origin == "cmaes"
    assert reached["cmaes"].fitness < reached["random"].fitness


def test_a_search_by_cmaes_that_was_stopped_goes_on_as_if_not(pruner, tmp_path):
    budget = ParameterBudget(pruner.shape, 0.3, p_min=0.1, p_max=0.9, tied=True)
    whole = found(equal_budget.CmaEs(budget), budget)
    found(equal_budget.CmaEs(budget), budget, Journal(tmp_path, {}), evaluations=90.0)
    assert found(equal_budget.CmaEs(budget), budget, Journal(tmp_path, {})) == whole


def test_every_method_starts_from_the_same_plans():
    budget = ParameterBudget(AutoPruner(tiny_model("llama"), None, "x").shape, 0.3, p_min=0.1, tied=True)
    first, again, other = (equal_budget.population(budget, seed) for seed in (0, 0, 1))
    assert len(first) == equal_budget.PAPER.population
    assert first == again != other


def test_rows_are_paired_with_the_control(pruner, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(equal_budget, "load_embedded", lambda: pruner)
    monkeypatch.setattr(equal_budget, "PAPER", SMALL)
    monkeypatch.setattr(equal_budget, "SETTINGS", SHORT)
    monkeypatch.setattr(equal_budget, "WINDOWS", 3)
    texts = [tmp_path / name for name in ("search.txt", "unseen.txt")]
    for seed, path in enumerate(texts):
        letters = np.random.default_rng(seed).choice(list("abcdefgh "), 4000)
        path.write_text("".join(letters))
    words = [tmp_path / "work", *texts, "--methods", "evolution", "cmaes", "--seeds", "0", "--evaluations", "12"]
    words = [*map(str, words), "--output", str(tmp_path)]
    equal_budget.main(words)
    rows = json.loads((tmp_path / "equal_budget.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["cmaes", "evolution"]
    own, control = rows
    kept = {row["method"]: row["nats"] for row in equal_budget.Rows(tmp_path / "work" / "rows.jsonl")}
    gaps = np.array(kept["cmaes"]) - np.array(kept["evolution"])
    assert own["difference"] == pytest.approx(gaps.mean(), abs=1e-4)
    assert own["standard_error"] == pytest.approx(gaps.std(ddof=1) / 3**0.5, abs=1e-4)
    assert "difference" not in control
    assert own["best_start"] == control["best_start"] >= own["fitness"]
    assert own["evaluations"] >= 12
    capsys.readouterr()
    equal_budget.main(words)
    assert capsys.readouterr().out == "wrote equal_budget.json\n"  # nothing is done again
