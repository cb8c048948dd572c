"""Uniform plans make stock models: of every architecture, saved, and loaded without remote code."""

from __future__ import annotations

import json

import pytest
import torch
from support.checks import check_left_padding, logits
from support.tiny import CONFIGS, save_tiny, tiny_model, tiny_tokenizer
from support.trained import VOCABULARY, trained_tokenizer
from transformers import AutoModelForCausalLM

from exporters.export import export
from selfpruner_hub.cli.main import main
from selfpruner_hub.errors import BudgetError, UserError
from selfpruner_hub.hub.bundle import collect
from selfpruner_hub.models.architectures import shape_of, stock_class
from selfpruner_hub.plans.budget import Rates
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.target import target_of
from selfpruner_hub.plans.uniform import UniformBudget
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage.model_record import read_record

IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
QUICK = {
    "data": "self", "window": 32, "calibration_tokens": 1024, "fitness_tokens": 256, "fisher_tokens": 256,
    "multiple_of": 1, "progress": False,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_uniform_model_is_a_stock_model(name, tmp_path):
    dense = tiny_model(name)
    pruned = AutoPruner(dense, tiny_tokenizer(), f"tests/{name}").prune(0.2, uniform=True, **QUICK)
    assert type(pruned.model) is type(dense) is stock_class(dense.config)
    shape, kept = shape_of(dense.config), pruned.plan.layers
    assert len(set(kept)) == 1
    assert kept[0].num_key_value_heads == shape.dense.layers[0].num_key_value_heads
    assert kept[0].intermediate_size < shape.dense.layers[0].intermediate_size
    pruned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == CONFIGS[name].model_type
    assert {"rope_theta", "rope_scaling"} <= config.keys()
    assert not {"auto_map", "per_layer_config"} & config.keys()
    assert not list(tmp_path.glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False, dtype=torch.float32).eval()
    assert type(stock) is type(dense)
    assert torch.equal(logits(stock, IDS), logits(pruned.model, IDS))
    check_left_padding(stock, IDS[:, :20], pad=0)
    again = PrunedModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.report == pruned.report
    assert torch.equal(logits(again.model, IDS), logits(pruned.model, IDS))
    card = (tmp_path / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "without remote code" in card


def test_the_one_plan_is_the_nearest():
    shape = shape_of(tiny_model("llama").config)
    budget = UniformBudget(shape, 0.3)
    plans = [budget.project(Rates((a,) * 4, (f,) * 4)) for a, f in ((0, 0.3), (0.5, 0.1), (0.9, 0.9))]
    assert len(set(plans)) == 1
    widths = [Plan.of([width] * 4, [4] * 4) for width in range(1, 49)]
    assert plans[0] == min(widths, key=lambda plan: abs(shape.beta(plan) - 0.3))
    assert abs(shape.beta(plans[0]) - 0.3) <= budget.tolerance


def test_a_target_is_reached_by_the_widest():
    shape = shape_of(tiny_model("llama").config)
    costs = Costs.of_parameters(shape)
    target = target_of({"memory": 0.8}, "torch", None)
    budget = UniformBudget.for_target(shape, costs, target)
    plan = budget.project(Rates((0.0,) * 4, (0.0,) * 4))
    wider = Plan.of([plan.layers[0].intermediate_size + 1] * 4, [4] * 4)
    assert costs.share(wider) < budget.share <= costs.share(plan) + 1e-9


@pytest.mark.parametrize(
    ("beta", "bounds", "says"),
    [
        (0.9, {}, "with rates in .* and all of its KV heads"),
        (0.2, {"tied": True}, "cuts the FFNs alone"),
        (0.2, {"p_min": 0.1}, "cuts the FFNs alone"),
    ],
)
def test_what_no_uniform_plan_reaches_is_refused(beta, bounds, says):
    with pytest.raises(BudgetError, match=says):
        UniformBudget(shape_of(tiny_model("llama").config), beta, **bounds)


def test_there_is_nothing_to_search():
    pruner = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    with pytest.raises(UserError, match="one plan, and nothing to search"):
        pruner.prune(0.2, uniform=True, proposer="evolution", **QUICK)


def test_a_stock_model_replaces_one_with_code(tmp_path):
    """What is left of the code would say that it is needed; publishing asks for none."""
    pruner = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    pruner.prune(0.2, **QUICK).save_pretrained(tmp_path)
    assert (tmp_path / "modeling_selfpruned.py").is_file()
    pruner.prune(0.2, uniform=True, **QUICK).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "config.json" in collect(tmp_path).files


@pytest.mark.parametrize(
    "form", ["gguf", pytest.param("onnx", marks=pytest.mark.heavy), pytest.param("openvino", marks=pytest.mark.heavy)]
)
def test_an_export_keeps_the_record(form, tmp_path):
    """Each is compared with PyTorch as it is made."""
    pytest.importorskip({"gguf": "gguf", "onnx": "onnxruntime", "openvino": "openvino"}[form])
    pruner = AutoPruner(tiny_model("llama", vocab_size=VOCABULARY), trained_tokenizer(), "tests/llama")
    pruner.prune(0.2, uniform=True, **QUICK).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", form, tmp_path / "out")
    assert read_record(tmp_path / "out") == read_record(tmp_path / "model")


def test_the_option_of_the_command_line(tmp_path):
    dense = save_tiny("qwen3", tmp_path / "dense")
    sets = [
        word
        for name, value in QUICK.items()
        if name not in ("data", "progress")
        for word in ("--set", f"{name}={value}")
    ]
    words = ["prune", dense, "--beta", "0.2", "--uniform", "--data", "self", "--output", tmp_path / "out", *sets]
    assert main([str(word) for word in words]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"
    assert read_record(tmp_path / "out").stock
