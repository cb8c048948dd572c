"""Presets: the paper's numbers, and every setting that is refused."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest

from selfpruner_hub.errors import UserError
from selfpruner_hub.evaluation.fitness import METRICS
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import LossCurves, StepEffects
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruning.importance import ORDERS
from selfpruner_hub.settings import CHOICES, PRESETS, PruneSettings, explained, resolve


def test_the_paper_preset_has_the_papers_numbers():
    paper = resolve("paper")
    assert (paper.population, paper.crossover, paper.mutation) == (30, 10, 10)
    assert paper.evaluations == 30 + 20 * (10 + 10) == 430
    assert (paper.p_min, paper.p_max) == (0.1, 0.9)
    assert (paper.importance, paper.repair, paper.fitness, paper.tied) == ("wanda-sp", False, "perplexity", True)
    assert paper.first_share == 1  # every candidate is scored on all windows
    assert paper.seeds == ("uniform",)


def test_the_default_preset_repairs_and_scores_in_stages():
    default = resolve("default")
    assert default == PruneSettings()
    assert default.repair
    assert default.first_share < 1
    assert default.seeds == ("uniform", "ramp", "sensitivity", "refined")


def test_changes_replace_settings_and_none_leaves_them_alone():
    assert resolve("paper", fitness=None, p_max=0.5) == resolve("paper", p_max=0.5)
    assert resolve("paper", p_max=0.5).p_max == 0.5
    assert PRESETS["paper"].p_max == 0.9


@pytest.mark.parametrize("preset", PRESETS)
def test_the_record_is_json_with_every_setting(preset):
    values = json.loads(json.dumps(PRESETS[preset].record()))
    lists = {key: tuple(values[key]) for key in ("seeds", "shares")}
    assert resolve(preset, **{**values, **lists}) == PRESETS[preset]


def test_the_choices_are_those_of_the_modules_that_define_them():
    assert set(CHOICES["importance"]) == set(ORDERS)
    assert set(CHOICES["fitness"]) == set(METRICS)
    budget = ParameterBudget(ModelShape(8, 4, 1, Plan.of([16], [2])), 0.3)
    curves = [LossCurves(np.linspace(1, 0, 3), np.linspace(1, 0, 17))]
    effects = StepEffects(*[(math.inf,)] * 4)
    assert CHOICES["seeds"] == tuple(seeds(budget, curves, lambda _plan: 1.0, lambda _plan: effects))


def test_shares_are_kept_as_they_are():
    assert resolve("default", shares=(3, 0.5)).record()["shares"] == [3, 0.5]
    assert resolve("default").shares == ()


@pytest.mark.parametrize("first_share", [1e-6, 1])
def test_bounds_of_a_range_are_inside_it(first_share):
    assert resolve("default", first_share=first_share).first_share == first_share


def test_a_search_without_evaluations_needs_no_children():
    assert resolve("default", evaluations=0, crossover=0, mutation=0).mutation == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "papers"}, "Unknown preset 'papers'.*default, draft, fast, best, paper"),
        ({"betta": 1, "alpha": 2}, "Unknown setting alpha, betta.*importance"),
        ({"evaluations": -1}, "evaluations must be a number from 0 "),
        ({"evaluations": float("nan")}, "evaluations must be a number from 0 "),
        ({"evaluations": float("inf")}, "evaluations must be a number from 0 "),
        ({"window": 1}, "window must be a number from 2 "),
        ({"calibration_tokens": 0}, "calibration_tokens must be a number from 1 "),
        ({"fisher_tokens": 0}, "fisher_tokens must be a number from 1 "),
        ({"fitness_tokens": 0}, "fitness_tokens must be a number from 1 "),
        ({"written_share": 0}, "written_share must be a number from 1e-06 to 1e"),
        ({"first_share": 0}, "first_share must be a number from 1e-06 to 1"),
        ({"first_share": 1.5}, "first_share must be a number from 1e-06 to 1"),
        ({"survivors": -0.5}, "survivors must be a number from 0 to 1"),
        ({"temperature": 0}, "temperature must be a number from 0.001 "),
        ({"population": -1}, "must not be negative"),
        ({"crossover": -1}, "must not be negative"),
        ({"mutation": -1}, "must not be negative"),
        ({"crossover": 0, "mutation": 0, "evaluations": 1}, "needs crossover or mutation.*above 0"),
        ({"evaluations": "many"}, "evaluations must be a number; got 'many'"),
        ({"p_max": "high"}, "p_max must be a number"),
        ({"window": 32.5}, "window must be a whole number"),
        ({"population": "ten"}, "population must be a whole number"),
        ({"multiple_of": 1.5}, "multiple_of must be a whole number"),
        ({"crossover": True}, "crossover must be a whole number"),
        ({"repair": "no"}, "repair must be true or false"),
        ({"tied": 1}, "tied must be true or false"),
        ({"seeds": "uniform"}, "seeds must be a list of names"),
        ({"seeds": ()}, "Unknown seeds"),
        ({"seeds": ("uniform", "best")}, "Unknown seeds.*Choose from: uniform"),
        ({"fitness": "accuracy"}, "Unknown fitness 'accuracy'.*kl, perplexity"),
        ({"importance": "magnitude"}, "Unknown importance 'magnitude'.*wanda-sp"),
        ({"importance": 5}, "importance must be a name"),
        ({"shares": 0.5}, "shares must be a list of numbers"),
        ({"shares": "half"}, "shares must be a list of numbers"),
        ({"shares": (1, 0)}, r"shares must be numbers above 0; got \[1, 0\]"),
        ({"shares": (-1, 2)}, "shares must be numbers above 0"),
        ({"shares": (float("nan"),)}, "shares must be numbers above 0"),
        ({"shares": (float("inf"), 1)}, "shares must be numbers above 0"),
        ({"shares": ("1", 1)}, "shares must be numbers above 0"),
        ({"own_text": 0.5}, "Unknown setting own_text"),
    ],
    ids=str,
)
def test_what_is_refused(changes, said):
    with pytest.raises(UserError, match=said) as caught:
        resolve(**{"preset": "default", **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_is_explained(preset):
    told = explained(preset)
    assert [setting.name for setting in told] == [f.name for f in fields(PruneSettings)]
    assert all(setting.meaning.endswith(".") or ";" in setting.meaning for setting in told)
    assert all(setting.kind for setting in told)
    json.dumps([setting.default for setting in told])
    values = {setting.name: setting.default for setting in told}
    assert (
        resolve(preset, **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        == PRESETS[preset]
    )


def test_a_meaning_is_the_docstring_in_one_line():
    (share,) = (setting for setting in explained() if setting.name == "probe_share")
    assert (share.kind, share.default) == ("a number", 0.25)
    assert share.meaning.startswith("Share of the fitness windows on which small changes")
    assert share.meaning.endswith("for a language model that proposes; 0 measures none.")


def test_a_preset_that_is_unknown_is_not_explained():
    with pytest.raises(UserError, match="Unknown preset 'papers'.*default, draft, fast, best, paper"):
        explained("papers")
