"""Damaged files: whatever value of a record is wrong or missing, what reads it works, or refuses it in one line."""

import json
import shutil
from pathlib import Path

import pytest
from support.chat import assistant, chat_tokenizer, user
from support.damaged import told_clearly
from support.exports import OPTIONS, export_record

from exporters.format import FORMATS
from selfpruner_hub.calibration.chat_template import conversation_ids
from selfpruner_hub.calibration.text_sources import entries
from selfpruner_hub.hub.card import render_card, render_onnx_card
from selfpruner_hub.hub.plots import plot_search
from selfpruner_hub.hub.space import static_files
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import StepEffects
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.search.journal import JOURNAL_FILE, Journal
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.proposers import EvolutionProposer
from selfpruner_hub.settings import SearchSchedule
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, read_export
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, Record

BUDGET = Budget(ModelShape(hidden_size=16, head_dim=4, queries_per_group=2, dense=Plan.of([64] * 3, [4] * 3)), 0.3)


def read_record(value):
    record = Record.from_json(json.dumps(value), "record")
    assert isinstance(record.search_verdict, str)
    for card in (render_card(record, chat=True), render_onnx_card(record, "me/graphs", "me/model", Sizes())):
        card.encode()
    static_files(record, "me/graphs", "https://huggingface.co")
    record.to_json().encode()


class Sizes(dict):
    """In place of the files of graphs, which are not there."""

    def __missing__(self, name):
        return Path(__file__)


def reader_of_journals(folder):
    def read(lines):
        folder.mkdir(exist_ok=True)
        (folder / JOURNAL_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        plot_search(folder, folder / "plots", formats=())

    return read


def search_of(folder):
    """A search in a folder, whose score is the first width; it goes on from the journal that is there."""
    schedule = SearchSchedule(population=2, crossover=3, mutation=3, evaluations=12)
    steps = StepEffects(*((0.1, -0.1, 0.2),) * 4)

    def score(plan, share):
        return plan.layers[0].intermediate_size + share

    problem = Problem(BUDGET, seeds(BUDGET), score, lambda *_: steps)
    return search(EvolutionProposer(BUDGET), problem, Journal(folder, {"beta": 0.3}), schedule).best.plan


def resumed_from(folder):
    def resume(lines):
        (folder / JOURNAL_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        plan = search_of(folder)
        assert BUDGET.shape.contains(plan)
        assert abs(BUDGET.removed_share(plan) - 0.3) <= BUDGET.tolerance

    return resume


def reader_of_exports(folder):
    def read(value):
        folder.mkdir(exist_ok=True)
        (folder / EXPORT_RECORD_FILE).write_text(json.dumps(value))
        record = FORMATS[read_export(folder).format].read(folder)
        assert record.has_hub_layout in (True, False)
        assert record.source["name"] or record.options["dtype"] or True

    return read


def reader_of_configs(model):
    def read(value):
        (model / "config.json").write_text(json.dumps(value))
        PrunedModel.from_pretrained(model, device="cpu")

    return read


def reader_of_conversations(folder):
    tokenizer = chat_tokenizer("llama3")

    def read(values):
        folder.mkdir(exist_ok=True)
        (folder / "talks.jsonl").write_text("".join(f"{json.dumps(value)}\n" for value in values))
        for talk in entries(folder / "talks.jsonl"):
            if not isinstance(talk, str):
                conversation_ids(tokenizer, talk)

    return read


def records(model):
    """A record with all that records may have."""
    value = json.loads((model / MODEL_RECORD_FILE).read_text())
    value["metrics"]["perplexity (32)"] = {
        "value": 20.5, "dense": 12.25, "protocol": "4 windows", "dataset": "a.txt", "machine": "a CPU",
    }  # fmt: skip
    value["method"]["target"] = {
        "quantity": "memory", "value": 0.5, "runtime": "torch", "predicted": 0.49, "measured": 0.49,
    }  # fmt: skip
    value["method"]["training"] = "distilled from its parent"
    value["recovery"] = {
        "method": "full", "tokens": 100, "minutes": 0.5, "curve": [[50, 0.5], [100, 0.25]],
        "texts": [{"name": "self", "tokens_read": 100}],
        "deciding": [{"name": "self", "tokens": 31, "before": 0.5, "after": 0.25}],
    }  # fmt: skip
    return value


def exports(form):
    identity = {"model_type": "llama", "parameters": 1000, "weights": "0", "configuration": "0"}
    return json.loads(export_record(form, identity).to_json())


TALKS = [
    {"messages": [user("What do bees make?"), assistant("Honey.")]},
    {"messages": [user("And?"), {"role": "assistant", "content": [{"type": "text", "text": "Wax."}]}]},
    {"text": "Bees."},
]


def journal(model):
    return [json.loads(line) for line in (model / JOURNAL_FILE).read_text().splitlines()]


def test_records(saved_models):
    value = records(saved_models / "first")
    read_record(value)
    assert min(told_clearly(value, read_record, 150)[kind] for kind in ("fine", "refused")) > 10


def test_journals(saved_models, tmp_path):
    lines, read = journal(saved_models / "first"), reader_of_journals(tmp_path)
    read(lines)
    assert min(told_clearly(lines, read, 50)[kind] for kind in ("fine", "refused")) > 3


def test_searches_that_go_on(tmp_path):
    search_of(tmp_path)
    lines, resume = journal(tmp_path), resumed_from(tmp_path)
    resume(lines)
    assert min(told_clearly(lines, resume, 50)[kind] for kind in ("fine", "refused")) > 3


@pytest.mark.parametrize("form", OPTIONS)
def test_export_records(form, tmp_path):
    value, read = exports(form), reader_of_exports(tmp_path)
    read(value)
    assert min(told_clearly(value, read, 50)[kind] for kind in ("fine", "refused")) > 3


def test_configurations(saved_models, tmp_path):
    model = shutil.copytree(saved_models / "first", tmp_path / "model")
    value, read = json.loads((model / "config.json").read_text()), reader_of_configs(model)
    read(value)
    assert told_clearly(value, read, 50)["refused"] > 3


def test_conversations(tmp_path):
    read = reader_of_conversations(tmp_path)
    read(TALKS)
    assert min(told_clearly(TALKS, read, 50)[kind] for kind in ("fine", "refused")) > 3
