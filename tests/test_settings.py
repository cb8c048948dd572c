"""Presets: the paper's numbers, and every setting that is refused."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest

from selfpruner_hub.errors import UserError
from selfpruner_hub.evaluation.fitness import METRICS
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import LossCurves, StepEffects
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruning.experts import SCORES
from selfpruner_hub.pruning.importance import ORDERS
from selfpruner_hub.settings import CHOICES, PRESETS, PruneSettings, SearchSchedule, explained, resolve


def test_the_paper_preset_has_the_papers_numbers():
    paper = resolve("paper")
    assert (paper.schedule.population, paper.schedule.crossover, paper.schedule.mutation) == (30, 10, 10)
    assert paper.schedule.evaluations == 30 + 20 * (10 + 10) == 430
    assert (paper.p_min, paper.p_max) == (0.1, 0.9)
    assert (paper.importance, paper.repair, paper.fitness, paper.tied) == ("wanda-sp", "none", "perplexity", True)
    assert paper.schedule.first_share == 1  # every candidate is scored on all windows
    assert paper.seeds == ("uniform",)


def test_the_default_preset_repairs_and_scores_in_stages():
    default = resolve("default")
    assert default == resolve(None) == PruneSettings()
    assert default.repair == "full"
    assert default.schedule.first_share < 1
    assert default.seeds == ("uniform", "ramp", "sensitivity", "refined")


def test_changes_replace_settings_and_none_leaves_them_alone():
    assert resolve("paper", fitness=None, p_max=0.5) == resolve("paper", p_max=0.5)
    assert resolve("paper", p_max=0.5).p_max == 0.5
    assert PRESETS["paper"].p_max == 0.9


@pytest.mark.parametrize("preset", PRESETS)
def test_the_record_is_json_with_every_setting(preset):
    values = json.loads(json.dumps(PRESETS[preset].record()))
    assert resolve(preset, **{**values, "seeds": tuple(values["seeds"])}) == PRESETS[preset]


def test_the_choices_are_those_of_the_modules_that_define_them():
    assert set(CHOICES["importance"]) == {*ORDERS, *SCORES}
    assert set(CHOICES["fitness"]) == set(METRICS)
    budget = Budget(ModelShape(8, 4, 1, Plan.of([16], [2])), 0.3)
    curves = [LossCurves(np.linspace(1, 0, 3), np.linspace(1, 0, 17))]
    effects = StepEffects(*[(math.inf,)] * 4)
    assert CHOICES["seeds"] == tuple(seeds(budget, curves, lambda _plan: 1.0, lambda _plan: effects))


def test_shares_are_kept_as_they_are():
    assert resolve("default", shares=(3, 0.5)).record()["shares"] == [3, 0.5]
    assert resolve("default").shares == 0.5


@pytest.mark.parametrize("first_share", [1e-6, 1])
def test_bounds_of_a_range_are_inside_it(first_share):
    assert resolve("default", schedule={"first_share": first_share}).schedule.first_share == first_share


def test_a_search_without_evaluations_needs_no_children():
    assert resolve("default", evaluations=0, schedule={"crossover": 0, "mutation": 0}).schedule.mutation == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "papers"}, "Unknown preset 'papers'.*default, draft, best, paper"),
        ({"betta": 1, "alpha": 2}, "Unknown setting alpha, betta.*importance"),
        ({"evaluations": -1}, "evaluations must be a number from 0 "),
        ({"evaluations": float("nan")}, "evaluations must be a number from 0 "),
        ({"evaluations": float("inf")}, "evaluations must be a number from 0 "),
        ({"window": 1}, "window must be a whole number from 2 "),
        ({"calibration_tokens": 0}, "calibration_tokens must be a whole number from 1 "),
        ({"fisher_tokens": 0}, "fisher_tokens must be a whole number from 1 "),
        ({"fitness_tokens": 0}, "fitness_tokens must be a whole number from 1 "),
        ({"fewest_experts": -1}, "fewest_experts must be a whole number from 0 "),
        ({"schedule": {"first_share": 0}}, "schedule.first_share must be a number from 1e-06 to 1"),
        ({"schedule": {"first_share": 1.5}}, "schedule.first_share must be a number from 1e-06 to 1"),
        ({"schedule": {"survivors": -0.5}}, "schedule.survivors must be a number from 0 to 1"),
        ({"schedule": {"population": -1}}, "schedule.population must be a whole number from 0 to"),
        ({"schedule": {"crossover": -1}}, "schedule.crossover must be a whole number from 0 to"),
        ({"schedule": {"mutation": -1}}, "schedule.mutation must be a whole number from 0 to"),
        ({"schedule": SearchSchedule(mutation=-1)}, "schedule.mutation must be a whole number from 0 to"),
        ({"schedule": 5}, "schedule must be a SearchSchedule or a mapping of its fields; got 5"),
        ({"schedule": {"length": 5}}, "Unknown setting schedule.length.*Known: schedule.evaluations"),
        ({"schedule": {"crossover": 0, "mutation": 0}, "evaluations": 1}, "needs crossover or mutation.*above 0"),
        ({"schedule": {"crossover": 0, "mutation": 0}}, "needs crossover or mutation.*evaluations to 0"),
        ({"schedule": {"evaluations": 1}, "evaluations": 1}, "both given"),
        ({"schedule": SearchSchedule(1), "evaluations": 1}, "both given"),
        ({"evaluations": "many"}, "evaluations must be a number from 0 to 1e.09; got 'many'"),
        ({"p_max": "high"}, "p_max must be a number"),
        ({"window": 32.5}, "window must be a whole number"),
        ({"schedule": {"population": "ten"}}, "population must be a whole number"),
        ({"multiple_of": 1.5}, "multiple_of must be a whole number"),
        ({"schedule": {"crossover": True}}, "crossover must be a whole number"),
        ({"multiple_of": True}, "multiple_of must be a whole number; got True"),
        ({"p_max": False}, "p_max must be a number; got False"),
        ({"repair": "no"}, "Unknown repair 'no'.*Choose from: none, output, sequential, full"),
        ({"repair": True}, "repair must be a name; got True.*Choose from: none, output, sequential, full"),
        ({"tied": 1}, "tied must be true or false"),
        ({"seeds": "uniform"}, "seeds must be a list of names"),
        ({"seeds": ()}, "Unknown seeds"),
        ({"seeds": ("uniform", "best")}, "Unknown seeds.*Choose from: uniform"),
        ({"fitness": "accuracy"}, "Unknown fitness 'accuracy'.*kl, perplexity"),
        ({"importance": "magnitude"}, "Unknown importance 'magnitude'.*wanda-sp"),
        ({"importance": 5}, "importance must be a name"),
        ({"shares": 0}, "shares must be a number or a list of numbers from 1e-06 to 1e"),
        ({"shares": "half"}, "shares must be a number or a list of numbers from"),
        ({"shares": ()}, r"shares must be .* got \(\)"),
        ({"shares": (1, 0)}, r"shares must be .* from 1e-06 to 1e.06; got \(1, 0\)"),
        ({"shares": (-1, 2)}, "shares must be a number or a list of numbers from 1e-06"),
        ({"shares": (float("nan"),)}, "shares must be a number or a list of numbers from 1e-06"),
        ({"shares": (float("inf"), 1)}, "shares must be a number or a list of numbers from 1e-06"),
        ({"shares": ("1", 1)}, "shares must be a number or a list of numbers from 1e-06"),
        ({"own_text": 0.5}, "Unknown setting own_text. Known: importance, repair,"),
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
    *names, last = (f.name for f in fields(PruneSettings))
    assert last == "schedule"
    assert [setting.name for setting in told] == [*names, *(f"schedule.{f.name}" for f in fields(SearchSchedule))]
    assert all(setting.meaning.endswith(".") or ";" in setting.meaning for setting in told)
    assert all(setting.kind for setting in told)
    json.dumps([setting.default for setting in told])
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in ((s.name, s.default) for s in told)}
    schedule = {name.partition(".")[2]: values.pop(name) for name in list(values) if "." in name}
    assert resolve(preset, schedule=schedule, **values) == PRESETS[preset]


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("default", (73_728, 8_192, 16_384)),
        ("draft", (4_096, 1_024, 2_048)),
        ("best", (131_072, 16_384, 16_384)),
        ("paper", (32_768, 8_192, 2_048)),
    ],
)
def test_the_other_texts_follow_the_calibration_text_unless_given(preset, sizes):
    def of(**changes):
        settings = resolve(preset, **changes)
        return settings.calibration_tokens, settings.fisher_tokens, settings.fitness_tokens

    assert of() == sizes
    assert of(calibration_tokens=2 * sizes[0]) == tuple(2 * size for size in sizes)
    assert of(calibration_tokens=2 * sizes[0], fisher_tokens=7) == (2 * sizes[0], 7, 2 * sizes[2])
    assert of(calibration_tokens=1) == (1, 1, 1)
    assert of(fitness_tokens=9) == (*sizes[:2], 9)


def test_a_mapping_changes_the_presets_schedule_and_a_schedule_replaces_it():
    mapped = resolve("paper", schedule={"crossover": 3}).schedule
    assert (mapped.evaluations, mapped.population, mapped.crossover) == (430, 30, 3)
    assert resolve("paper", schedule=SearchSchedule(crossover=3)).schedule == SearchSchedule(crossover=3)
    assert resolve("paper", schedule=SearchSchedule(crossover=3), evaluations=7).schedule == SearchSchedule(
        7, crossover=3
    )


def test_a_meaning_is_the_docstring_in_one_line():
    (share,) = (setting for setting in explained() if setting.name == "schedule.probe_share")
    assert (share.kind, share.default) == ("a number", 0.25)
    assert share.meaning.startswith("Share of the fitness windows on which small changes")
    assert share.meaning.endswith("for a proposer that reads them; 0 measures none.")


def test_a_preset_that_is_unknown_is_not_explained():
    with pytest.raises(UserError, match="Unknown preset 'papers'.*default, draft, best, paper"):
        explained("papers")
