"""Mixtures through the main path: prune by β and for memory, record and card, resume, streamed, uniform counts."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checks import logits
from support.mixtures import MIXTURES, tiny_mixture
from support.tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from selfpruner_hub.cli.main import main
from selfpruner_hub.errors import BudgetError, UnsupportedArchitectureError, UserError
from selfpruner_hub.hub.bundle import is_export_of
from selfpruner_hub.hub.plots import plot_search
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.uniform import UniformBudget
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage.export_record import read_export
from selfpruner_hub.storage.model_record import read_record
from selfpruner_hub.storage.offload import DiskStore

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
QUICK = {"data": "self", "window": 32, "calibration_tokens": 1024, "fitness_tokens": 256, "fisher_tokens": 256}
SETS = [f"{name}={value}" for name, value in QUICK.items() if name != "data"]


def pruner(name: str) -> AutoPruner:
    return AutoPruner(tiny_mixture(name), tiny_tokenizer(), f"tests/{name}")


@functools.cache
def pruned(name: str, **changes) -> PrunedModel:
    return pruner(name).prune(0.4, progress=False, **QUICK, **changes)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_pruned(name):
    whole, found = tiny_mixture(name), pruned(name)
    shape = shape_of(whole.config)
    assert shape.contains(found.plan)
    assert shape.beta(found.plan) == pytest.approx(0.4, abs=Budget(shape, 0.4).tolerance)
    least = [w.intermediate_size for w in shape.least]
    assert all(kept.intermediate_size >= few for kept, few in zip(found.plan.layers, least, strict=True))
    assert shape_of(found.model.config).dense == found.plan
    record = json.loads(found.report.to_json())
    assert record["widths"]["num_experts"] == [w.intermediate_size for w in found.plan.layers]
    assert record["method"]["importance"] == "reap-sum"
    assert record["method"]["repair"] == "sequential"
    assert record["parameters"]["pruned"] == sum(p.numel() for p in found.model.parameters())
    assert logits(found.model, IDS).isfinite().all()


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_a_pruned_mixture_is_saved_with_its_record_and_card(name, tmp_path):
    found = pruned(name)
    found.save_pretrained(tmp_path)
    again = PrunedModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.report == found.report
    torch.testing.assert_close(logits(again.model, IDS), logits(found.model, IDS), atol=1e-6, rtol=1e-5)
    card = (tmp_path / "README.md").read_text()
    assert "experts" in card
    assert "active: unchanged" in card
    assert "FFN channels" not in card
    assert {path.stem for path in plot_search(tmp_path, tmp_path / "plots", ["png"])} >= {"rates", "population"}


@pytest.mark.parametrize("name", ["qwen3_moe", "ernie4_5_moe"])
def test_uniform_counts_are_a_stock_mixture(name, tmp_path):
    found = pruned(name, uniform=True)
    assert len({w.intermediate_size for w in found.plan.layers} - {0}) == 1
    found.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock, IDS), logits(found.model, IDS), atol=1e-6, rtol=1e-5)
    assert not list(tmp_path.glob("*.py"))
    assert read_record(tmp_path).stock


def test_layers_of_the_files_that_the_model_has_not_are_left_out(tmp_path):
    """GLM-4.5's files have one more layer of experts, which predicts a second token."""
    tiny_mixture("glm4_moe").save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    more = {
        name.replace(f".{last}.", f".{last + 1}.", 1): value.clone()
        for name, value in weights.items()
        if name.startswith(f"model.layers.{last}.")
    }
    save_file({**weights, **more}, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    found, _ = load_model(str(tmp_path / "whole"), store=DiskStore(tmp_path / "store"), dtype=torch.float32)
    torch.testing.assert_close(logits(found, IDS), logits(tiny_mixture("glm4_moe"), IDS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "granitemoeshared", "ernie4_5_moe"])
def test_a_streamed_mixture_is_the_one_in_memory(name, tmp_path):
    """Files of a stock mixture hold a tensor per expert; streamed, they are joined as they are read."""
    tiny_mixture(name).save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    made = []
    for folder in (None, tmp_path / "offload"):
        source = AutoPruner.from_pretrained(
            tmp_path / "whole", device="cpu", offload_folder=folder, dtype=torch.float32
        )
        found = source.prune(0.4, progress=False, **QUICK)
        made.append((found.plan, logits(found.model, IDS)))
    assert made[0][0] == made[1][0]
    torch.testing.assert_close(made[0][1], made[1][1], atol=1e-5, rtol=1e-4)


def test_a_run_resumes(tmp_path):
    class StoppedError(Exception):
        pass

    def until(what: str):
        def progress(stage: str, done: int, total: int) -> None:
            if stage == what and done == 2:
                raise StoppedError

        return progress

    for stage in ("sensitivities", "ordering", "repairing"):
        with pytest.raises(StoppedError):
            pruner("qwen2_moe").prune(0.4, run_dir=tmp_path, progress=until(stage), **QUICK)
    found = pruner("qwen2_moe").prune(0.4, run_dir=tmp_path, progress=False, **QUICK)
    assert found.plan == pruned("qwen2_moe").plan
    torch.testing.assert_close(logits(found.model, IDS), logits(pruned("qwen2_moe").model, IDS), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("uniform", [False, True])
def test_fewer_experts_than_a_token_is_routed_to_stay_only_if_asked_for(uniform, tmp_path):
    with pytest.raises(BudgetError, match="at least 3 of its experts"):
        pruner("qwen3_moe").prune(0.8, progress=False, **QUICK, uniform=uniform)
    found = pruner("qwen3_moe").prune(0.8, progress=False, **QUICK, fewest_experts=1, uniform=uniform)
    counts = [w.intermediate_size for w in found.plan.layers]
    assert 1 <= min(counts) < 3
    assert [c.num_experts_per_tok for c in found.model.config.per_layer_config] == [min(3, n) for n in counts]
    found.save_pretrained(tmp_path)
    again = PrunedModel.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again.model, IDS), logits(found.model, IDS), atol=1e-6, rtol=1e-5)
    card = (tmp_path / "README.md").read_text()
    assert "active: unchanged" not in card
    assert "routes each token to all of them" in card


def test_a_model_with_fewer_experts_than_a_token_was_routed_to_is_cut_again():
    found = pruner("qwen3_moe").prune(0.8, progress=False, **QUICK, fewest_experts=1)
    again = AutoPruner(found.model, tiny_tokenizer(), "a/b").prune(0.25, progress=False, **QUICK, fewest_experts=1)
    counts = [w.intermediate_size for w in again.plan.layers]
    assert sum(counts) < sum(w.intermediate_size for w in found.plan.layers)
    assert [c.num_experts_per_tok for c in again.model.config.per_layer_config] == [min(3, n) for n in counts]
    assert logits(again.model, IDS).isfinite().all()


def test_a_router_of_pairs_keeps_two():
    found = pruner("dots1").prune(0.7, progress=False, **QUICK, fewest_experts=1)
    assert min(w.intermediate_size for w in found.plan.layers if w.intermediate_size) == 2
    assert logits(found.model, IDS).isfinite().all()


@pytest.mark.parametrize(("name", "fewest", "said"), [("llama", 1, "has no experts"), ("mixtral", 9, "at least 9 of")])
def test_a_least_number_of_experts_that_cannot_be_is_refused(name, fewest, said):
    model = tiny_mixture(name) if name in MIXTURES else tiny_model(name)
    with pytest.raises(UserError, match=said):
        AutoPruner(model, tiny_tokenizer(), "a/b").prune(0.4, progress=False, fewest_experts=fewest, **QUICK)


@pytest.mark.parametrize("importance", ["reap", "frequency"])
def test_other_orders(importance):
    found = pruned("qwen3_moe", importance=importance, repair="none")
    assert found.report.method["importance"] == importance
    assert found.report.method["repair"] == "none"


@pytest.mark.parametrize("target", [{"speedup": 1.5}, {"latency": 10}, {"kv_cache": 0.5}])
def test_targets_that_experts_cannot_change_are_refused(target):
    with pytest.raises(UserError, match="only the bytes of the weights change"):
        pruner("mixtral").prune(target=target, progress=False, **QUICK)


def test_a_target_of_memory_is_reached():
    found = pruner("qwen3_moe").prune(target={"memory": 0.8}, progress=False, **QUICK)
    figures = found.report.method["target"]
    assert figures["measured"] <= 0.8
    assert figures["measured"] == pytest.approx(figures["predicted"], abs=0.02)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "uniform"), [("mixtral", False), ("qwen2_moe", True)])
def test_onnx_of_a_mixture_equals_pytorch(name, uniform, tmp_path):
    pytest.importorskip("onnxruntime")
    found = pruned(name, uniform=uniform)
    found.save_pretrained(tmp_path / "model")
    found.export("onnx", tmp_path / "onnx")
    assert read_export(tmp_path / "onnx", "onnx").max_difference < 1e-5
    assert is_export_of(tmp_path / "onnx", tmp_path / "model", found.report)


def test_a_file_of_llama_cpp_is_refused(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="one number of experts for all layers"):
        pruned("mixtral").export("gguf", tmp_path / "gguf")


def test_a_search_over_experts():
    found = pruner("qwen2_moe").prune(0.4, proposer="evolution", evaluations=3, progress=False, **QUICK)
    assert found.report.proposer["evaluations"] >= 3
    shape = shape_of(MIXTURES["qwen2_moe"])
    assert shape.beta(found.plan) == pytest.approx(0.4, abs=Budget(shape, 0.4).tolerance)
    assert found.plan.layers[0] == shape.dense.layers[0]
    with pytest.raises(UserError, match="not measured for experts"):
        pruner("qwen2_moe").prune(0.4, proposer="slopes", progress=False, **QUICK)


def test_what_has_no_meaning_for_experts_is_refused():
    with pytest.raises(BudgetError, match="which a mixture of experts keeps"):
        pruner("mixtral").prune(0.3, tied=True, progress=False, **QUICK)
    with pytest.raises(BudgetError, match="at least 3 of its experts"):
        pruner("olmoe").prune(0.8, progress=False, **QUICK)


def test_budgets_keep_layers_without_experts():
    shape = shape_of(MIXTURES["qwen2_moe"])
    assert [w.intermediate_size for w in shape.dense.layers] == [0, 8, 8]
    plan = Budget(shape, 0.3).project(Rates((0.9, 0.9, 0.9), (0.9, 0.1, 0.6)))
    assert plan.layers[0] == shape.dense.layers[0]
    assert all(kept.num_key_value_heads == 2 for kept in plan.layers)
    assert shape.rates(plan)[0] == 0
    uniform = UniformBudget(shape, 0.3)._plan
    assert [w.intermediate_size for w in uniform.layers] == [0, 6, 6]
    assert np.isclose(shape.beta(uniform), 0.25)


def test_the_command_prunes_a_mixture(tmp_path, capsys):
    tiny_mixture("olmoe").save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    sets = [word for each in SETS for word in ("--set", each)]
    words = ["prune", tmp_path / "whole", "--beta", "0.4", "--data", "self", "--output", tmp_path / "out", *sets]
    assert main([str(word) for word in words]) == 0
    assert "num_experts" in read_record(tmp_path / "out").widths
