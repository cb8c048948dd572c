"""The main job on the real SmolLM2-135M-Instruct, with text and proposals of its own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from support.checks import (
    check_cache,
    check_causality,
    check_left_padding,
    check_tokenizers_without_package,
    check_without_package,
    logits,
)
from support.processes import run_python
from transformers import AutoModelForCausalLM

from selfpruner_hub.calibration.generated_text import sample_windows
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.loading import EMBEDDED_MODEL
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.search.journal import read_journal
from selfpruner_hub.search.journal_lines import ScoreLine
from selfpruner_hub.storage.model_record import read_record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(real_pruned):
    """The saved model."""
    return real_pruned / "model"


@pytest.fixture(scope="module")
def model(directory):
    """The saved model, loaded in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def before(real_pruned):
    """Token ids, and the model's logits before it was saved."""
    return torch.load(real_pruned / "before.pt")


@pytest.fixture(scope="module")
def ids(before):
    return before["ids"]


def test_counts_and_rates(real_pruner, directory, model):
    record = json.loads((directory / "selfpruner.json").read_text())
    with safe_open(directory / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert stored == record["parameters"]["pruned"] == sum(p.numel() for p in model.parameters())
    assert record["parameters"]["dense"] == 134_515_008
    assert abs(sum(record["rates"]) / 30 - 0.2) < 0.001
    assert abs(record["achieved_beta"] - 0.2) < 0.001
    assert shape_of(real_pruner.model.config).num_layers == len(record["rates"]) == 30
    assert record["base_model"] == EMBEDDED_MODEL


def test_it_proposed_rates_itself(directory):
    asks = [json.loads(line) for line in (directory / "search.jsonl").read_text().splitlines() if '"ask"' in line]
    own = [ask for ask in asks if ask["proposer"] == "self"]
    replies = [reply for ask in own for reply in ask["replies"]]
    assert {ask["operation"] for ask in own} == {"mutation", "crossover"}
    assert len(replies) >= 4
    assert all(r["rates"] for r in replies)  # constrained decoding: every reply is well-formed
    assert json.loads((directory / "selfpruner.json").read_text())["proposer"]["replies"]["accepted"] >= 4


def test_saved_and_reloaded(real_pruner, real_pruned, before):
    again = PrunedModel.from_pretrained(real_pruned / "model", dtype=before["logits"].dtype)
    assert torch.equal(logits(again.model, before["ids"]), before["logits"])
    assert again.report.to_json() == (real_pruned / "before.json").read_text()
    assert again.tokenizer.decode(before["ids"][0]) == real_pruner.tokenizer.decode(before["ids"][0])


def test_loaded_without_the_package(directory, model, ids, tmp_path):
    linked = tmp_path / "model"  # logits are written beside the weights
    linked.mkdir()
    for path in directory.iterdir():
        (linked / path.name).symlink_to(path)
    found = check_without_package({linked: ids}, tmp_path)[linked]
    torch.testing.assert_close(found, logits(model, ids), atol=1e-3, rtol=1e-3)


def test_tokenizer_without_the_package(directory, real_pruner, tmp_path):
    check_tokenizers_without_package({directory: real_pruner.tokenizer}, tmp_path)


def test_causality(model, ids):
    """In float64: in float32 the kernels of two lengths round apart, by 1e-4 in the dense model as in the pruned."""
    precise, half = copy.deepcopy(model).double(), ids.shape[1] // 2
    torch.testing.assert_close(logits(precise, ids)[:, :half], logits(precise, ids[:, :half]), atol=1e-6, rtol=1e-6)
    check_causality(precise, ids[:, :6])


def test_cache(model, ids):
    check_cache(model, ids)


def test_left_padding(model, ids):
    check_left_padding(model, ids, pad=2)


def test_its_plan_is_better_than_uniform_rates(directory):
    """Both were scored on the same windows, as what the second repair leaves."""
    _, lines = read_journal(directory / "search.jsonl")
    scored = [line for line in lines if isinstance(line, ScoreLine) and line.share < 1]
    (uniform,) = [line.fitness for line in scored if line.origin == "seed:uniform"]
    (found,) = [line.fitness for line in scored if line.plan == read_record(directory).plan]
    assert found < 0.95 * uniform  # both on a quarter of a short text


def test_it_still_speaks(real_pruner, model):
    """On text that neither calibration nor search saw, it is near its parent."""
    windows = sample_windows(real_pruner.model, 8, 64, seed=1)
    assert divergence(model, windows, teach(real_pruner.model, windows)) < 0.8  # nats a token; without repair above 1.5
    dense, left = perplexity(real_pruner.model, windows), perplexity(model, windows)
    assert dense < left < 2.5 * dense  # on text of its parent, about exp(KL) times


def test_command_line_evaluates_the_saved_model(directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun. " * 40)
    words = ["evaluate", directory, "--data", text, "--no-chat", "--window", 128, "--json"]
    done = run_python("-m", "selfpruner_hub.cli", *words)
    assert done.returncode == 0, done.stderr[-500:]
    assert 1 < json.loads(done.stdout)["metrics"]["perplexity (128)"]["value"] < 50
