"""A language model as proposer, on a tiny random one: the worst case for a reply that must be well-formed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.search.llm.local_model import ModelProposer
from selfpruner_hub.search.proposers import Scored, random_rates
from selfpruner_hub.settings import LanguageModelOptions


@pytest.fixture(scope="module", params=[False, True], ids=["split", "tied"])
def asked(request):
    model = tiny_model("llama")
    model.config.max_position_embeddings = 4096
    budget = Budget(shape_of(model.config), 0.3, tied=request.param)
    rng = np.random.default_rng(0)
    plans = [budget.project(random_rates(budget, rng)) for _ in range(6)]
    history = [Scored(p, budget.rates(p), 0.1 * i, 1.0, "seed", 0) for i, p in enumerate(plans, 1)]
    return ModelProposer(model, tiny_tokenizer(), budget, "tests/llama", LanguageModelOptions()), budget, history


@pytest.mark.parametrize("operation", ["initial", "crossover", "mutation"])
def test_every_reply_is_well_formed_and_on_the_budget(asked, operation):
    proposer, budget, history = asked
    replies = proposer.ask(operation, history, 4, np.random.default_rng(3))
    assert len(replies) == 4
    assert len({r.reply for r in replies}) > 1
    for reply in replies:
        assert isinstance(reply.rates, Rates), reply.error
        assert abs(budget.shape.beta(budget.project(reply.rates)) - 0.3) <= budget.tolerance
        whole = {"rates"} if budget.tied else {"attention", "ffn"}
        assert set(json.loads(reply.reply)) >= whole
        assert len(reply.parents) == {"initial": 0, "crossover": 2, "mutation": 1}[operation]
        assert all(0 <= parent < 5 for parent in reply.parents)
        assert "0.1000" in reply.prompt  # the best solution was shown
        assert reply.tokens > 0


def test_a_crossover_child_stays_within_the_range_of_the_solutions_shown(asked):
    proposer, budget, history = asked
    seen = [s.rates for s in history[:5]]
    for reply in proposer.ask("crossover", history, 4, np.random.default_rng(3)):
        for part in ("attention", "ffn"):
            for layer, rate in enumerate(getattr(reply.rates, part)):
                values = [getattr(rates, part)[layer] for rates in seen]
                assert min(values) - 0.0051 <= rate <= max(values) + 0.0051  # whole percentages


def test_a_mutation_changes_a_few_layers_of_the_parent_it_names(asked):
    proposer, budget, history = asked
    for reply in proposer.ask("mutation", history, 4, np.random.default_rng(3)):
        parent = history[reply.parents[0]].rates
        changed = [a != b for a, b in zip(reply.rates.ffn, parent.ffn, strict=True)]
        assert sum(changed) <= 8
        assert max(abs(a - b) for a, b in zip(reply.rates.ffn, parent.ffn, strict=True)) <= 0.15 + 1e-9
        assert reply.parents[0] <= 2  # of the better half


def test_the_same_state_gives_the_same_replies(asked):
    proposer, _, history = asked
    first, again, other = (
        [r.reply for r in proposer.ask("mutation", history, 2, np.random.default_rng(seed))] for seed in (1, 1, 2)
    )
    assert first == again != other
