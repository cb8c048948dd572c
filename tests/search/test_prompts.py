"""Prompts say what the task is, what was found, and what was measured."""

import json
import math
from dataclasses import replace

import pytest
from support.solutions import SLOPES, TIED, UNTIED, history

from selfpruner_hub.errors import UserError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.target import target_of
from selfpruner_hub.search.llm.prompts import render, solution
from selfpruner_hub.search.llm.question import SHOWN, Question
from selfpruner_hub.search.llm.reply_schema import PARENTS
from selfpruner_hub.search.proposers import Scored

OPERATIONS = list(PARENTS)


def test_a_solution_is_compact_json():
    rates = Rates((0.0, 1 / 3, 2 / 3), (0.104, 0.2, 0.9))
    assert solution(UNTIED, rates) == '{"attention":[0,33,67],"ffn":[10,20,90]}'
    assert solution(TIED, rates) == '{"rates":[10,20,90]}'


# A bug once: with one tied rate a layer, solutions show the rates of the FFN, not those of the layers: here 16 %
# everywhere, under a prompt that asks for a mean of 20 %. A reply that repeats a solution is another plan.
def test_a_tied_solution_shows_rates_whose_mean_is_beta():
    budget = Budget(ModelShape(576, 64, 3, Plan.of([1536] * 4, [3] * 4)), 0.2, tied=True)
    plan = budget.project(Rates.tied([0.2] * 4))
    assert json.loads(solution(budget, budget.rates(plan))) == {"rates": [20] * 4}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_prompt_for_a_target_names_what_is_charged_for(operation):
    costs = Costs.linear(UNTIED.shape, 30.0, 0.5, 20.0, "ms")
    budget = Budget.for_target(UNTIED.shape, costs, target_of({"speedup": 1.25}, "onnx"))
    prompt = render(Question(operation, history(UNTIED, 2), budget), "m")
    assert "What is removed must save 21.3 % of the time of a request of 128 + 32 tokens in onnx" in prompt
    assert "1 % of the attention saves 0.85 %, 1 % of the feed-forward saves 0.15 %" in prompt
    assert "weights must be" not in prompt
    assert "The mean over all weights must be 30 %." in render(Question(operation, history(UNTIED, 2), UNTIED), "m")


# -- what was measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [UNTIED, TIED], ids=["untied", "tied"])
def test_what_was_measured_is_told(budget):
    past = history(budget, 3)
    past[1] = replace(past[1], slopes=SLOPES)
    if budget.tied:
        told = "removing more costs least in layers 2, 3."
    else:
        told = "removing less of attention gains most in layers 3; removing more of ffn costs least in layers 2, 3."
    assert f"Measured at solution 2, best first: {told}" in render(Question("mutation", past, budget), "m")
    assert "Measured" not in render(Question("mutation", history(budget, 3), budget), "m")


def test_only_layers_that_pay_are_promising():
    past = [replace(s, slopes=SLOPES) for s in history(UNTIED, 1)]
    assert Question("mutation", past, UNTIED).promising == {
        ("attention", "more"): [],
        ("attention", "less"): [3],
        ("ffn", "more"): [2, 3],
        ("ffn", "less"): [],
    }
    costly = replace(SLOPES, ffn_removed=(9.0,) * 3, attention_removed=(math.inf,) * 3)
    assert Question("mutation", [replace(past[0], slopes=costly)], UNTIED).promising == {}
    assert "Measured" not in render(Question("mutation", [replace(past[0], slopes=costly)], UNTIED), "m")


def test_what_was_measured_is_shown_whatever_its_rank():
    past = history(UNTIED, 9)
    past[7] = replace(past[7], slopes=SLOPES)
    assert Question("mutation", past, UNTIED).shown == [*past[: SHOWN - 1], past[7]]
    assert f"Measured at solution {SHOWN}, best first" in render(Question("mutation", past, UNTIED), "m")


# -- render -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_prompt_states_the_task_and_shows_solutions_from_worst_to_best(budget, operation):
    past = history(budget, 9)
    prompt = render(Question(operation, past, budget), "Tiny-1")
    for fact in ("Tiny-1", "3 decoder layers", "30 %", "90", "lower loss is better"):
        assert fact in prompt
    lines = [line for line in prompt.splitlines() if line[:1].isdigit()]
    assert lines == [
        f"{rank + 1}. loss {1.5 + rank:.4f}: {solution(budget, past[rank].rates)}" for rank in range(SHOWN - 1, -1, -1)
    ]
    assert ("attention" in lines[0]) != budget.tied
    assert "$" not in prompt


def test_each_operation_asks_for_something_else():
    prompts = {render(Question(operation, history(UNTIED, 3), UNTIED), "m") for operation in OPERATIONS}
    assert len(prompts) == 3


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_prompt_without_history_says_so(operation):
    assert "(none)" in render(Question(operation, [], UNTIED), "m")


def test_shown_is_the_best_few():
    past = history(UNTIED, 9)
    assert Question("mutation", past, UNTIED).shown == past[:SHOWN]
    assert Question("mutation", past[:2], UNTIED).shown == past[:2]


def test_a_plan_without_a_finite_loss_can_be_shown():
    past = [Scored(s.plan, s.rates, math.inf, 1.0, "random", 1) for s in history(UNTIED, 2)]
    assert "2. loss inf: {" in render(Question("mutation", past, UNTIED), "m")


def test_own_templates_are_filled(tmp_path):
    (tmp_path / "mutation.txt").write_text("$model $layers $hidden_size $heads $groups $channels $beta $p_max $$")
    assert render(Question("mutation", [], UNTIED), "é", tmp_path) == "é 3 16 6 3 32 30 90 $"


def test_a_missing_template_is_a_user_error(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"initial\.txt cannot be used"):
            render(Question("initial", [], UNTIED), "m", directory)


@pytest.mark.parametrize("template", [b"$nonsense", b"costs 5 $", b"${layers", b"\xff\xfe"])
def test_a_bad_template_is_a_user_error(tmp_path, template):
    (tmp_path / "initial.txt").write_bytes(template)
    with pytest.raises(UserError, match=r"initial\.txt cannot be used"):
        render(Question("initial", [], UNTIED), "m", tmp_path)


def test_a_mixture_is_told_of_its_experts():
    shape = ModelShape(16, 4, 2, Plan.of([0, 64, 64], [3] * 3, "num_experts"), 3, True, 100, 8)
    budget = Budget(shape, 0.3)
    assert "and 64 routed experts per layer" in render(Question("initial", [], budget), "m")
    assert "and 32 feed-forward channels per layer" in render(Question("initial", [], UNTIED), "m")
