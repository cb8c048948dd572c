"""The contract of every architecture in the table, on tiny random models: cut, run, save, load."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors import safe_open
from support.checks import check_cache, check_causality, check_left_padding, check_without_package, logits
from support.tiny import CONFIGS, DISTINCT, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from selfpruner_hub import memory
from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.models.architectures import ARCHITECTURES, architecture_of, linear, shape_of
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.importance import LayerOrder, rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.output_repair import LayerRepairs, first_repairs
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import Slicer, slice_model
from selfpruner_hub.pruning.temperature import match_confidence
from selfpruner_hub.settings import resolve

IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
WINDOWS = torch.randint(3, 128, (64, 32), generator=torch.Generator().manual_seed(1))


def uneven_plan(model) -> Plan:
    """Every layer different: attention and FFN, one layer left whole."""
    budget = Budget(shape_of(model.config), 0.3)
    return budget.project(Rates((0.0, 0.5, 0.25, 0.6), (0.0, 0.3, 0.5, 0.2)))


class Case(NamedTuple):
    """A dense model, its cut with the first repair, and what lies between."""

    dense: PreTrainedModel
    repairs: list[LayerRepairs]
    order: list[LayerOrder]
    plan: Plan
    repaired: PreTrainedModel


@functools.cache
def cut(name: str) -> Case:
    dense = tiny_model(name)
    statistics = calibrate(dense, WINDOWS)
    order, plan = rank(dense, statistics), uneven_plan(dense)
    repairs = first_repairs(dense, order, statistics)
    with ordered(dense, order):
        return Case(dense, repairs, order, plan, slice_model(Slicer(dense, repairs), plan))


@pytest.fixture(params=CONFIGS)
def case(request):
    return cut(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tiny models pruned by the whole main path and saved: name → (directory, pruned model)."""
    found = {}
    for name in DISTINCT:
        pruner = AutoPruner(tiny_model(name), tiny_tokenizer(), f"tests/{name}")
        pruned = pruner.prune(
            0.3, data="self", proposer="evolution", window=32, calibration_tokens=2048, fitness_tokens=256,
            evaluations=4, progress=False,
        )  # fmt: skip
        directory = tmp_path_factory.mktemp("saved") / name
        pruned.save_pretrained(directory)
        found[name] = directory, pruned
    return found


def test_every_row_of_the_table_has_a_tiny_model():
    dense = {name for name, row in ARCHITECTURES.items() if row.experts is None}  # mixtures: test_mixtures.py
    assert {config.model_type for config in CONFIGS.values()} == dense


def test_layers_have_their_own_widths(case):
    dense, plan, sliced = case.dense, case.plan, case.repaired
    shape = shape_of(dense.config)
    assert len(set(plan.layers)) > 2
    groups = [layer.num_key_value_heads for layer in plan.layers]
    assert (len(set(groups)) > 1) == (shape.dense.layers[0].num_key_value_heads > 1 and not shape.whole_attention)
    assert shape_of(sliced.config).dense == plan
    removed = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in sliced.parameters())
    weights = shape.weights(shape.dense) - shape.weights(plan)
    others, left = (
        sum(p.numel() for n, p in m.named_parameters() if "layers" in n and ("norm" in n or n.endswith("bias")))
        for m in (dense, sliced)
    )
    assert removed == weights + others - left


def test_sliced_equals_masked(case):
    """Zeroing the removed columns of o_proj and down_proj in the dense model is the same function."""
    dense, order, plan = case.dense, case.order, case.plan
    architecture = architecture_of(dense.config)
    masked = copy.deepcopy(dense)
    with ordered(dense, order):
        sliced = slice_model(Slicer(dense), plan)
    shape = shape_of(dense.config)
    heads = shape.queries_per_group * shape.head_dim
    for layer, by, kept in zip(masked.model.layers, order, plan.layers, strict=True):
        linear(layer, architecture.ffn_output).weight.data[:, by.channels[kept.intermediate_size :]] = 0
        for group in by.groups[kept.num_key_value_heads :].tolist():
            linear(layer, architecture.attention_output).weight.data[:, group * heads : (group + 1) * heads] = 0
    torch.testing.assert_close(logits(sliced, IDS), logits(masked, IDS), atol=1e-4, rtol=1e-4)


def test_ordering_is_no_change_and_is_undone(case):
    dense, order = case.dense, case.order
    before, weights = logits(dense, IDS), {k: v.clone() for k, v in dense.state_dict().items()}
    with ordered(dense, order):
        torch.testing.assert_close(logits(dense, IDS), before, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(v, weights[k]) for k, v in dense.state_dict().items())


def test_a_candidate_equals_the_sliced_model_and_copies_no_input_weights(case):
    dense, plan = case.dense, case.plan
    with ordered(dense, case.order):
        slicer = Slicer(dense, case.repairs)
        layers = slicer.layers(plan)
        with with_layers(dense, layers):
            candidate = logits(dense, IDS)
        assert torch.equal(candidate, logits(slice_model(slicer, plan), IDS))
        for projection in architecture_of(dense.config).inputs:
            if len(projection.blocks) == 1:  # a fused projection is joined from several views
                for mine, theirs in zip(layers, dense.model.layers, strict=True):
                    views = (linear(layer, projection.path).weight.data_ptr() for layer in (mine, theirs))
                    assert len(set(views)) == 1


def test_weights_lie_in_memory_as_a_linear_layer_reads_them(case):
    """The solver of the repair returns columns; with them every product takes half as long again."""
    assert all(parameter.is_contiguous() for parameter in case.repaired.parameters())


def test_it_can_be_trained_further(case):
    model = copy.deepcopy(case.repaired).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sliced_model_shares_nothing_with_the_dense_one(case):
    dense, sliced = case.dense, case.repaired
    assert not {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in sliced.parameters()}


def test_repair_lowers_the_damage(case):
    dense, order, plan, repaired = case.dense, case.order, case.plan, case.repaired
    with ordered(dense, order):
        unrepaired = slice_model(Slicer(dense), plan)
    wanted = logits(dense, WINDOWS)
    errors = [(logits(model, WINDOWS) - wanted).square().mean() for model in (repaired, unrepaired)]
    assert errors[0] < errors[1]


def test_causality(case):
    check_causality(case.repaired, IDS)


def test_generation_with_and_without_cache_agrees(case):
    check_cache(case.repaired, IDS[:, :10])


def test_left_padded_batches_agree_with_single_prompts(case):
    check_left_padding(case.repaired, IDS[:, :20], pad=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_can_be_set(case, implementation):
    model = copy.deepcopy(case.repaired)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{type(model).__name__} has no sdpa attention")
    model.set_attn_implementation(implementation)
    assert model.model.layers[1].self_attn.config._attn_implementation == implementation
    torch.testing.assert_close(logits(model, IDS), logits(case.repaired, IDS), atol=1e-4, rtol=1e-4)
    check_causality(model, IDS)


def test_saved_and_reloaded(case, tmp_path):
    case.repaired.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(case.repaired)
    assert torch.equal(logits(again, IDS), logits(case.repaired, IDS))


@pytest.mark.parametrize("name", DISTINCT)
def test_saved_and_reloaded_by_the_auto_class(saved, name):
    directory, pruned = saved[name]
    again = AutoModelForCausalLM.from_pretrained(directory)  # selfpruner_hub is imported: no trust_remote_code
    assert type(again) is type(pruned.model)
    assert torch.equal(logits(again, IDS), logits(pruned.model, IDS))
    assert PrunedModel.from_pretrained(directory).report == pruned.report


@pytest.mark.parametrize("name", DISTINCT)
def test_the_decoder_alone_and_under_other_heads(saved, name):
    """AutoModel is what vLLM builds; classifiers are for those who train on."""
    directory, pruned = saved[name]
    with torch.no_grad():
        wanted = pruned.model.get_decoder()(IDS).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(directory).eval()(IDS).last_hidden_state, wanted)
    autos = {"AutoModelForSequenceClassification", "AutoModelForTokenClassification"}
    dense = tiny_model(name).config_class
    autos = {auto for auto in autos if dense in getattr(transformers, auto)._model_mapping}  # not all have both
    assert autos == {auto for auto in named(directory) if auto.endswith("Classification")}
    for auto in autos:
        model = getattr(transformers, auto).from_pretrained(directory, num_labels=3).eval()
        with torch.no_grad():
            assert torch.equal(model.base_model(IDS).last_hidden_state, wanted)
        labels = torch.zeros((2,) if "Sequence" in auto else (2, 40), dtype=torch.long)
        model(IDS, labels=labels).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert model.base_model.config is model.config


def named(directory):
    """The classes that a saved model names, by Auto class."""
    return json.loads((directory / "config.json").read_text())["auto_map"]


@pytest.mark.parametrize("name", DISTINCT)
def test_the_code_beside_the_weights_holds_one_family(saved, name):
    """So that a transformers which lacks another architecture can load it."""
    directory, _ = saved[name]
    code = (directory / "modeling_selfpruned.py").read_text()
    assert f'\nFAMILIES = ("{CONFIGS[name].model_type}",)\n' in code
    assert not [family for family in ARCHITECTURES if f'"{family}"' in code.replace(CONFIGS[name].model_type, "")]
    assert list(named(directory))[:3] == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]


@pytest.mark.heavy
def test_loaded_without_the_package(tmp_path):
    models = {tmp_path / name: cut(name).repaired for name in CONFIGS}
    for directory, model in models.items():
        model.save_pretrained(directory)
    found = check_without_package(dict.fromkeys(models, IDS), tmp_path)
    for directory, model in models.items():
        torch.testing.assert_close(found[directory], logits(model, IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DISTINCT)
def test_files_counts_and_rates_agree_with_the_record(saved, name):
    directory, pruned = saved[name]
    record = json.loads((directory / "selfpruner.json").read_text())
    with safe_open(directory / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert stored == record["parameters"]["pruned"]
    shape = shape_of(CONFIGS[name])
    sizes = [shape.layer_weights(w) for w in shape.dense.layers]
    mean = sum(r * n for r, n in zip(record["rates"], sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(record["achieved_beta"], abs=1e-5)
    assert mean == pytest.approx(0.3, abs=Budget(shape, 0.3).tolerance)


@pytest.mark.parametrize("name", DISTINCT)
def test_the_gain_of_the_search_is_checked_on_unseen_text(saved, name):
    """With both plans as the search had them."""
    _, pruned = saved[name]
    gains, data = pruned.report.proposer["gains"], pruned.report.data
    assert gains["search_text"][1] == pruned.report.metrics["search_fitness"].value <= gains["search_text"][0]
    assert all(0 < value < 10 for value in gains["unseen_text"])
    assert gains["unseen_text"] != gains["search_text"]
    same_plan = pruned.report.proposer["best_from"].startswith("seed:")
    assert (gains["unseen_text"][0] == gains["unseen_text"][1]) == same_plan
    assert len({text["sha256"] for text in data.values()}) == len(data) == 3
    assert data["unseen"]["tokens"] == data["fitness"]["tokens"]


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_the_search_scores_what_the_second_repair_leaves(metric, monkeypatch):
    """Of what a plan costs beyond the sum of its layers' losses, only where a second repair of gate and up follows."""
    pruner = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")

    def nats(remains, repair):
        monkeypatch.setattr("selfpruner_hub.search.find_plan.REMAINS", remains)
        found = pruner.prune(
            0.3, data="self", proposer="evolution", window=32, calibration_tokens=1024, fitness_tokens=256,
            evaluations=0, seeds=("uniform",), repair=repair, fitness=metric,
            progress=False,
        ).report.metrics["search_fitness"]  # fmt: skip
        assert ("weighed for the second repair" in found.protocol) == (repair == "full")
        return found.value if metric == "kl" else math.log(found.value)

    alone, all_of_it = nats(0, "full"), nats(1, "full")
    assert alone != pytest.approx(all_of_it, rel=1e-2)
    assert nats(0.3, "full") == pytest.approx(alone + 0.3 * (all_of_it - alone), abs=1e-5)
    assert nats(0.3, "output") == pytest.approx(all_of_it, abs=1e-5)
    assert nats(0.3, "sequential") == pytest.approx(all_of_it, abs=1e-5)


@pytest.mark.parametrize("name", DISTINCT)
def test_the_logits_are_scaled_as_the_record_says(saved, name):
    _, pruned = saved[name]
    scale, unit = pruned.report.metrics["search_logit_scale"].value, ARCHITECTURES[CONFIGS[name].model_type].norm_unit
    before = tiny_model(name).get_decoder().norm.weight
    torch.testing.assert_close(pruned.model.get_decoder().norm.weight.data, scale * (before.data + unit) - unit)
    assert 0.5 <= scale <= 1


def test_most_models_are_made_less_sure(saved):
    """A random model knows nothing, so less confidence is right, save where next to nothing was lost."""
    scales = [pruned.report.metrics["search_logit_scale"].value for _, pruned in saved.values()]
    assert sum(scale < 1 for scale in scales) > 0.8 * len(scales)


@pytest.mark.parametrize("name", DISTINCT)
def test_saved_again_and_read_again(saved, name, tmp_path):
    """What was loaded can be saved, and its configuration round-trips."""
    directory, pruned = saved[name]
    PrunedModel.from_pretrained(directory).save_pretrained(tmp_path / "again")
    config = AutoConfig.from_pretrained(tmp_path / "again")
    assert shape_of(config) == shape_of(pruned.model.config)
    assert str(directory) not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("name", DISTINCT)
def test_a_gpu_makes_what_a_cpu_makes(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    on_cpu, on_gpu = (made(name, device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
def test_a_gpu_without_room_makes_the_same(monkeypatch):
    """What rests in page-locked memory is copied without waiting, and is the same."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    plans, weights = [], []
    for full in (False, True):
        pruner = AutoPruner(tiny_model("llama").to("cuda"), tiny_tokenizer(), "tests/llama")
        if full:
            working = memory.needs(pruner.model, resolve(None), 0.3).working
            monkeypatch.setattr(memory, "free_memory", lambda _device, working=working: 1.2 * working)
        pruned = pruner.prune(
            0.3, data="self", window=32, calibration_tokens=1024, fitness_tokens=128, evaluations=0, progress=False
        )
        plans.append(pruned.plan)
        weights.append([parameter.cpu() for parameter in pruned.model.parameters()])
    assert plans[0] == plans[1]
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


def made(name, device):
    """Logits of a model that went through every stage but the search on the device."""
    model = tiny_model(name).to(device)
    statistics = calibrate(model, WINDOWS)
    order = rank(model, statistics)
    repairs = first_repairs(model, order, statistics)
    with ordered(model, order):
        pruned = slice_model(Slicer(model, repairs), uneven_plan(model))
    compensate(model, pruned, WINDOWS)
    match_confidence(model, pruned, WINDOWS)
    assert pruned.device.type == device
    return logits(pruned, IDS.to(device)).cpu()
