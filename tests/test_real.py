"""The main job on the real SmolLM2-135M-Instruct, with text and proposals of its own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from support.checks import (
    check_cache,
    check_causality,
    check_left_padding,
    check_tokenizer_without_package,
    check_without_package,
    logits,
)
from transformers import AutoModelForCausalLM

from selfpruner_hub.calibration.generated_text import sample_windows
from selfpruner_hub.cli.demo import NAME
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.pruned_model import PrunedModel

pytestmark = pytest.mark.slow
SETTINGS = {"data": "self", "window": 128, "calibration_tokens": 2048, "fitness_tokens": 1024, "progress": False}


@pytest.fixture(scope="module")
def case(real_pruner, tmp_path_factory):
    """(pruned by its own search, directory where it was saved, the directory loaded in float32)."""
    seeds = ("uniform", "sensitivity")
    pruned = real_pruner.prune(0.3, evaluations=8, population=4, crossover=4, mutation=4, seeds=seeds, **SETTINGS)
    directory = tmp_path_factory.mktemp("real") / "smollm2-b30"
    pruned.save_pretrained(directory)
    return pruned, directory, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids(real_pruner):
    text = "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after"
    return real_pruner.tokenizer(text, return_tensors="pt")["input_ids"]


def test_counts_and_rates(real_pruner, case):
    pruned, directory, _ = case
    record = json.loads((directory / "selfpruner.json").read_text())
    with safe_open(directory / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert stored == record["parameters"]["pruned"] == sum(p.numel() for p in pruned.model.parameters())
    assert record["parameters"]["dense"] == 134_515_008
    assert abs(sum(record["rates"]) / 30 - 0.3) < 0.001
    assert abs(record["achieved_beta"] - 0.3) < 0.001
    assert shape_of(real_pruner.model.config).num_layers == len(record["rates"]) == 30
    assert record["base_model"] == NAME


def test_it_proposed_rates_itself(case):
    pruned, directory, _ = case
    asks = [json.loads(line) for line in (directory / "search.jsonl").read_text().splitlines() if '"ask"' in line]
    replies = [r for ask in asks if ask["proposer"] == "self" for r in ask["replies"]]
    assert len(replies) >= 8
    assert all(r["rates"] for r in replies)  # constrained decoding: every reply is well-formed
    assert pruned.report.proposer["replies"]["accepted"] >= 8


def test_saved_and_reloaded(case, ids):
    pruned, directory, _ = case
    again = PrunedModel.from_pretrained(directory, dtype=pruned.model.dtype)
    assert torch.equal(logits(again.model, ids), logits(pruned.model, ids))
    assert again.report == pruned.report
    assert again.tokenizer.decode(ids[0]) == pruned.tokenizer.decode(ids[0])


def test_loaded_without_the_package(case, ids, tmp_path):
    _, directory, model = case
    found = check_without_package({directory: ids}, tmp_path)[directory]
    torch.testing.assert_close(found, logits(model, ids), atol=1e-3, rtol=1e-3)


def test_tokenizer_without_the_package(case, real_pruner, tmp_path):
    check_tokenizer_without_package(case[1], real_pruner.tokenizer, tmp_path)


def test_causality(case, ids):
    """In float64: in float32 the kernels of two lengths round apart, by 1e-4 in the dense model as in the pruned."""
    model, half = copy.deepcopy(case[2]).double(), ids.shape[1] // 2
    torch.testing.assert_close(logits(model, ids)[:, :half], logits(model, ids[:, :half]), atol=1e-6, rtol=1e-6)
    check_causality(model, ids[:, :6])


def test_cache(case, ids):
    check_cache(case[2], ids)


def test_left_padding(case, ids):
    check_left_padding(case[2], ids, pad=2)


def test_it_still_speaks(real_pruner, case):
    """On text that neither calibration nor search saw, it is better than its uniform twin, and near its parent."""
    pruned, _, _ = case
    uniform = real_pruner.prune(0.3, evaluations=0, seeds=("uniform",), **SETTINGS)
    windows = sample_windows(real_pruner.model, 16, 128, seed=1)
    teacher = teach(real_pruner.model, windows)
    searched_kl, uniform_kl = (divergence(p.model, windows, teacher) for p in (pruned, uniform))
    assert searched_kl < 0.9 * uniform_kl
    assert searched_kl < 0.8  # nats a token; cut without repair it is above 1.5
    dense, left = perplexity(real_pruner.model, windows), perplexity(pruned.model, windows)
    assert dense < left < 2.5 * dense  # on text of its parent, about exp(KL) times; 2.0 is measured of the defaults


def test_command_line_evaluates_the_saved_model(case, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun. " * 40)
    command = [sys.executable, "-m", "selfpruner_hub.cli", "evaluate", str(case[1]), "--data", str(text)]
    done = subprocess.run([*command, "--window", "128", "--json"], capture_output=True, text=True, check=True)
    assert 1 < json.loads(done.stdout)["metrics"]["perplexity (128)"]["value"] < 50
