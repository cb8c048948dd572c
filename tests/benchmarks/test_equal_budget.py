"""Proposers compared in the paper's setting: CMA-ES learns, a model is told of it, runs go on, pairs are kept."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import equal_budget
import numpy as np
import pytest
from optimisers import CmaEs, CmaEsWithModel, told
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.journal_lines import AskLine
from selfpruner_hub.search.llm.prompts import render
from selfpruner_hub.search.llm.question import Question
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.proposers import Proposal, RandomProposer, Scored, random_rates

SMALL = replace(
    equal_budget.PAPER,
    window=32,
    calibration_tokens=256,
    fitness_tokens=64,
    schedule=replace(equal_budget.PAPER.schedule, population=4),
)
CHILDREN = equal_budget.SCHEDULE.mutation
SHORT = replace(equal_budget.SCHEDULE, crossover=4, mutation=4)


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
    schedule = replace(equal_budget.SCHEDULE, evaluations=evaluations)
    return search(proposer, problem, journal or Journal(None, {}), schedule)


def test_cmaes_learns_from_the_scores(pruner):
    budget = Budget(pruner.shape, 0.3, p_min=0.1, p_max=0.9, tied=True)
    reached = {each.name: found(each, budget).best for each in (CmaEs(budget, CHILDREN), RandomProposer(budget))}
    assert reached["cmaes"].origin == "cmaes"
    assert reached["cmaes"].fitness < reached["random"].fitness


def test_a_search_by_cmaes_that_was_stopped_goes_on_as_if_not(pruner, tmp_path):
    budget = Budget(pruner.shape, 0.3, p_min=0.1, p_max=0.9, tied=True)
    whole = found(CmaEs(budget, CHILDREN), budget)
    found(CmaEs(budget, CHILDREN), budget, Journal(tmp_path, {}), evaluations=90.0)
    assert found(CmaEs(budget, CHILDREN), budget, Journal(tmp_path, {})) == whole


class Writes:
    """Keeps the prompts that a model would read, and answers with the uniform rates."""

    name = "writes"

    def __init__(self, budget, templates):
        self.budget, self.templates, self.prompts = budget, templates, []

    def ask(self, operation, history, count, rng):
        question = Question(operation, history, self.budget)
        self.prompts.append(render(question, "a model", self.templates))
        return [Proposal(None, prompt=self.prompts[-1], error="nothing to say")] * count


def test_the_model_inside_cmaes_is_told_where_the_optimiser_stands(pruner, tmp_path):
    budget = Budget(pruner.shape, 0.3, p_min=0.1, p_max=0.9, tied=True)
    made = []
    proposer = CmaEsWithModel(budget, CHILDREN, tmp_path, lambda at: made.append(Writes(budget, at)) or made[0])
    found(proposer, budget, Journal(tmp_path, {}), evaluations=60)
    asks = [line for line in Journal(tmp_path, {}).lines if isinstance(line, AskLine) and not line.attempt]
    assert proposer.name == "cmaes+writes"
    assert [sum(bool(reply.proposal.prompt) for reply in ask.replies) for ask in asks] == [3] * len(asks)  # of 10
    first, *_, last = made[0].prompts
    assert "Its step: 10.0 points" in first
    assert "Its step: 10.0 points" not in last
    assert last.count(", predicted ") == 20
    assert len(re.findall(r"\d\. loss", last)) == 5


def test_what_the_model_is_told_follows_the_scores(pruner):
    budget = Budget(pruner.shape, 0.3, p_min=0.1, p_max=0.9, tied=True)
    rng, layers = np.random.default_rng(0), budget.shape.num_layers
    history = []
    for number in range(60):
        plan = budget.project(random_rates(budget, rng))
        rates = budget.rates(plan)
        loss = math.exp(1 + 2 * rates.ffn[1] + 0.5 * rates.ffn[layers - 1])
        history.append(Scored(plan, rates, loss, 1.0, "seed:x", min(number // 10, 1)))
    history.sort(key=lambda scored: scored.fitness)
    said = told(budget, history, CmaEs(budget, CHILDREN)._learned(history))
    effects = said["effects"]
    assert max(range(layers), key=effects.__getitem__) == 1
    pairs = [re.match(r"loss ([\d.]+), predicted ([\d.]+):", line).groups() for line in said["trials"].split("\n")]
    measured, predicted = np.array(pairs, float).T
    assert np.corrcoef(measured, predicted)[0, 1] > 0.9


def test_every_method_starts_from_the_same_plans():
    budget = Budget(AutoPruner(tiny_model("llama"), None, "x").shape, 0.3, p_min=0.1, tied=True)
    first, again, other = (equal_budget.population(budget, seed) for seed in (0, 0, 1))
    assert len(first) == equal_budget.PAPER.schedule.population
    assert first == again != other


def test_every_method_can_be_made(pruner, tmp_path):
    words = [str(tmp_path), "search.txt", "unseen.txt", "--endpoint", "http://127.0.0.1:9/v1", "a-model"]
    options, budget = equal_budget._parser().parse_args(words), Budget(pruner.shape, 0.3, tied=True)
    made = equal_budget.proposers(pruner, budget, options.endpoint, tmp_path)
    assert set(made) == {*options.methods, "endpoint"}
    names = {method: make().name for method, make in made.items()}
    assert names.pop("endpoint") == "a-model behind an OpenAI-compatible endpoint"
    assert all(method == name for method, name in names.items())


def test_rows_are_paired_with_the_control(pruner, tmp_path, monkeypatch, capsys):
    for part in (pruner.model, pruner.tokenizer):
        part.save_pretrained(tmp_path / "embedded")
    monkeypatch.setattr(equal_budget, "embedded_model", lambda: {"name": str(tmp_path / "embedded")})
    monkeypatch.setattr(equal_budget, "PAPER", SMALL)
    monkeypatch.setattr(equal_budget, "SCHEDULE", SHORT)
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
    words[0] = str(tmp_path / "elsewhere")
    equal_budget.main([*words, "--seeds", "0", "1"])  # a new WORK takes the published rows
    more = json.loads((tmp_path / "equal_budget.json").read_text())["results"]
    assert more[:2] == rows
    assert [row["seed"] for row in more] == [0, 0, 1, 1]
