"""A target in place of β: searched for on costs, met, measured and recorded."""

import pytest
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner
from selfpruner_hub.errors import BudgetError, ExportError, RunMismatchError, UserError
from selfpruner_hub.hub.card import render_card
from selfpruner_hub.hub.plots import plot_search
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.storage.model_record import Record

SETTINGS = {
    "data": "self", "proposer": "evolution", "window": 32, "calibration_tokens": 640, "fitness_tokens": 256,
    "evaluations": 2, "schedule": {"crossover": 2, "mutation": 2}, "progress": False, "repair": "output",
}  # fmt: skip


class Meter:
    """A runtime that charges for attention alone, or for channels alone, and keeps to its word or not."""

    name = "abacus"

    def __init__(self, group=8.0, channel=0.1, off=1.0, error=None):
        self.group, self.channel, self.off, self.error = group, channel, off, error

    def costs(self, model, _tokenizer, target, _report):
        return Costs.linear(shape_of(model.config), self.group, self.channel, 20.0, target.unit)

    def measure(self, dense, pruned, tokenizer, target, report):
        if self.error:
            raise self.error
        costs = self.costs(dense, tokenizer, target, report)
        return costs.dense, self.off * costs.of(shape_of(pruned.config).dense)


def prune(meter, target=None, **settings):
    pruner = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    return pruner.prune(target=target or {"speedup": 1.3}, runtime=meter, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return prune(Meter(off=1.04), run_dir=tmp_path_factory.mktemp("runs") / "run")


def test_the_record_has_what_was_predicted_beside_what_was_measured(pruned):
    record = pruned.report
    known = record.method["target"]
    assert (known["quantity"], known["value"], known["runtime"]) == ("speedup", 1.3, "abacus")
    assert known["predicted"] == pytest.approx(1.3, rel=0.01)
    assert known["measured"] == pytest.approx(known["predicted"] / 1.04, rel=1e-4)
    metric = record.metrics["speedup in abacus"]
    assert metric.dense / metric.value == pytest.approx(known["measured"], rel=0.001)
    assert metric.unit == "ms"
    assert record.beta == record.achieved_beta
    assert Record.from_json(record.to_json(), "record") == record
    card = render_card(record, "small")
    assert "speedup = 1.3 in abacus" in card
    assert "β = " not in card.split("## How it was made")[1].split("*")[1]


def test_pictures_are_drawn_of_a_search_for_a_target(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "small")
    assert plot_search(tmp_path / "small", tmp_path / "pictures", ("png",))


def test_plans_follow_the_costs_and_not_the_weights(pruned):
    """Where attention is dear, it is cut; where channels are, they are: neither is the plan of the weights."""
    other = prune(Meter(group=0.1, channel=2.0))
    by_weights = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama").prune(
        pruned.report.achieved_beta, **SETTINGS
    )
    kept = [sum(each.report.widths["num_key_value_heads"]) for each in (pruned, by_weights, other)]
    assert kept[0] < kept[2]
    assert pruned.plan != by_weights.plan
    assert "target" not in by_weights.report.method


def test_a_search_for_a_target_resumes_and_is_no_other(pruned, tmp_path):
    first = prune(Meter(), run_dir=tmp_path)
    again = prune(Meter(), run_dir=tmp_path)
    assert again.plan == first.plan
    with pytest.raises(RunMismatchError, match="target"):
        prune(Meter(channel=0.2), run_dir=tmp_path)
    with pytest.raises(RunMismatchError, match="beta"):
        prune(Meter(), {"speedup": 1.25}, run_dir=tmp_path)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ExportError("The export differs.", "Allow more."), "The export differs. Allow more."),
        (ValueError("No kernel.\nIts registers: …"), "ValueError: No kernel."),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_model_whose_speed_cannot_be_measured_is_kept(error, why):
    made = prune(Meter(error=error), evaluations=0)
    known = made.report.method["target"]
    assert known["measured"] is None
    assert known["why"] == why
    assert "measured: no" in render_card(made.report, "small")


def test_what_cannot_be_reached_is_refused_before_the_search():
    with pytest.raises(BudgetError, match=r"speedup=9 in abacus cannot be reached: .* between 1\.000 and "):
        prune(Meter(), {"speedup": 9})


def test_one_of_beta_and_target_is_given():
    pruner = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    with pytest.raises(UserError, match="both given"):
        pruner.prune(0.3, target={"speedup": 1.3}, runtime=Meter(), **SETTINGS)
    with pytest.raises(BudgetError, match="beta must be a number"):
        pruner.prune(**SETTINGS)
    for unread in ({"runtime": "onnx"}, {"runtime": Meter()}, {"request": (1, 2)}):
        with pytest.raises(UserError, match="none is given"):
            pruner.prune(0.3, **unread, **SETTINGS)
    with pytest.raises(UserError, match="vllm"):
        pruner.prune(target={"speedup": 1.3}, runtime="vllm", **SETTINGS)
