"""The contract of every mixture of experts in the table, on tiny random models: cut, run, save, load."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from support.checks import check_cache, check_left_padding, check_without_package, logits
from support.mixtures import MIXTURES, Case, cut_by, masked, tiny_mixture
from transformers import AutoModelForCausalLM, PhimoeConfig

from selfpruner_hub.errors import UnsupportedArchitectureError
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, shape_of, stock_class
from selfpruner_hub.models.mixtures.routing import expert_output, routing_of
from selfpruner_hub.models.mixtures.table import EXPERTS
from selfpruner_hub.plans.plan import Plan, plan_of, widths_of
from selfpruner_hub.pruning.importance import LayerOrder
from selfpruner_hub.pruning.ordering import ordered

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
COUNTS = (5, 4, 6)
each_mixture = pytest.mark.parametrize("name", MIXTURES)


@functools.cache
def case(name: str) -> Case:
    return cut_by(tiny_mixture(name), COUNTS)


def test_every_row_of_the_table_has_a_tiny_mixture():
    assert set(MIXTURES) == set(EXPERTS)


@each_mixture
def test_the_shape_counts_routed_experts_alone(name):
    model = case(name).whole
    shape, row = shape_of(model.config), architecture_of(model.config).experts
    tensors = {key: value.shape for key, value in model.named_parameters()}
    counted = sum(
        shape.numel() for key, shape in tensors.items()
        if f".{row.block}.experts." in key or key.endswith(f".{row.block}.{row.router}.weight")
    )  # fmt: skip
    biases = sum(s.numel() for key, s in tensors.items() if ".experts." in key and key.endswith("_bias"))
    assert shape.weights(shape.dense) == counted - biases
    assert shape.fewest_units == model.config.num_experts_per_tok
    assert plan_of(json.loads(json.dumps(widths_of(shape.dense)))) == shape.dense


@each_mixture
def test_a_cut_mixture_is_the_whole_one_with_masked_experts(name):
    whole, kept, cut = case(name)
    with masked(whole, kept):
        wanted = logits(whole, IDS)
    assert (wanted - logits(whole, IDS)).abs().max() > 1e-3
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = copy.deepcopy(cut)
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(logits(model, IDS), wanted, atol=1e-6, rtol=1e-6)


@each_mixture
def test_layers_have_their_own_numbers_of_experts(name):
    whole, kept, cut = case(name)
    found = [w.intermediate_size for w in shape_of(cut.config).dense.layers]
    assert found == [len(each) for each in kept]
    assert len(set(found)) == len(found)
    removed = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in cut.parameters())
    shape = shape_of(whole.config)
    assert removed >= shape.weights(shape.dense) - shape.weights(shape_of(cut.config).dense)


@each_mixture
def test_ordering_a_mixture_is_no_change_and_is_undone(name):
    whole = tiny_mixture(name)
    before, weights = logits(whole, IDS), {k: v.clone() for k, v in whole.state_dict().items()}
    order = [
        LayerOrder(torch.arange(w.num_key_value_heads), torch.arange(w.intermediate_size).flip(0))
        for w in shape_of(whole.config).dense.layers
    ]
    with ordered(whole, order):
        torch.testing.assert_close(logits(whole, IDS), before, atol=1e-5, rtol=1e-5)
        assert any(not torch.equal(v, weights[k]) for k, v in whole.state_dict().items())
    assert all(torch.equal(v, weights[k]) for k, v in whole.state_dict().items())


@each_mixture
def test_a_saved_mixture_is_loaded_and_generates(name, tmp_path):
    cut = case(name).cut
    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(cut)
    torch.testing.assert_close(logits(again, IDS), logits(cut, IDS), atol=1e-6, rtol=1e-5)
    assert shape_of(again.config) == shape_of(cut.config)
    check_cache(again, IDS[:, :10])
    check_left_padding(again, IDS[:, :16], pad=0)


@each_mixture
def test_a_uniform_mixture_is_a_stock_model(name, tmp_path):
    uniform, own = (cut_by(case(name).whole, (5, 5, 5), stock=stock).cut for stock in (True, False))
    assert type(uniform) is stock_class(uniform.config)
    assert torch.equal(logits(uniform, IDS), logits(own, IDS))
    uniform.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval()
    assert torch.equal(logits(again, IDS), logits(uniform, IDS))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name


@each_mixture
def test_gates_and_outputs_are_those_of_the_block(name):
    """The reading of routers on which order, curves and repair rest."""
    model = case(name).whole
    row, layer = architecture_of(model.config).experts, decoder_layers(model)[-1]
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    routing = routing_of(row, model.config, layer, x)
    experts = layer.get_submodule(row.block).experts
    gates = routing.gates(torch.ones(8, dtype=torch.bool))
    outputs = torch.stack([expert_output(experts, index, x) for index in range(8)], 1)
    block = layer.get_submodule(row.block)
    _, weights, indices = block.get_submodule(row.router)(x)
    torch.testing.assert_close(gates.gather(1, indices), weights.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((gates[..., None] * outputs).sum(1), experts(x, indices, weights), atol=1e-5, rtol=1e-4)


@each_mixture
def test_near_ties_are_decided_as_by_the_router_in_bfloat16(name):
    model = tiny_mixture(name).to(torch.bfloat16)
    row, layer = architecture_of(model.config).experts, decoder_layers(model)[-1]
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    gates = routing_of(row, model.config, layer, x).gates(torch.ones(8, dtype=torch.bool))
    *_, indices = layer.get_submodule(row.block).get_submodule(row.router)(x)
    assert (gates.gather(1, indices) > 0).all()


@each_mixture
def test_gates_among_fewer_experts_are_those_of_a_masked_router(name):
    model, alive = tiny_mixture(name), torch.arange(8) % 2 == 0
    row, layer = architecture_of(model.config).experts, decoder_layers(model)[-1]
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    gates = routing_of(row, model.config, layer, x).gates(alive)
    experts = [w.intermediate_size for w in shape_of(model.config).dense.layers]
    with masked(model, [alive.nonzero()[:, 0] if count else torch.zeros(0) for count in experts]):
        _, weights, indices = layer.get_submodule(row.block).get_submodule(row.router)(x)
    torch.testing.assert_close(gates.gather(1, indices), weights.float(), atol=1e-6, rtol=1e-5)
    assert ((gates > 0).sum(-1) == model.config.num_experts_per_tok).all()


def test_the_loss_that_balances_experts_is_off_where_their_numbers_differ():
    whole = tiny_mixture("mixtral")
    whole.config.output_router_logits = True
    cut = cut_by(whole, COUNTS).cut.train()
    cut(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())
    assert cut_by(whole, (5, 5, 5), stock=True).cut.config.output_router_logits


@each_mixture
def test_a_layer_with_fewer_experts_than_top_k_routes_to_all_of_them(name, tmp_path):
    fewest = EXPERTS[name].fewest
    whole, kept, cut = cut_by(tiny_mixture(name), (2, fewest, 2))
    with masked(whole, kept):
        wanted = logits(whole, IDS)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        cut.set_experts_implementation(implementation)
        torch.testing.assert_close(logits(cut, IDS), wanted, atol=1e-6, rtol=1e-6)
    cut.save_pretrained(tmp_path / "own")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "own").eval()
    torch.testing.assert_close(logits(again, IDS), logits(cut, IDS), atol=1e-6, rtol=1e-5)
    stock = cut_by(whole, (fewest,) * 3, stock=True).cut
    assert stock.config.num_experts_per_tok == fewest
    stock.save_pretrained(tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", trust_remote_code=False).eval()
    torch.testing.assert_close(logits(again, IDS), logits(stock, IDS), atol=1e-6, rtol=1e-5)


def test_a_configuration_that_routes_to_more_experts_than_there_are_is_refused():
    config = case("qwen3_moe").cut.config
    few = {index: {"num_local_experts": 2} for index in range(3)}
    with pytest.raises(ValueError, match="cannot have 2 experts"):
        type(config).from_dict({**config.to_dict(), "per_layer_config": few}).validate()


def test_what_cannot_be_cut_is_refused_in_one_line():
    grouped = type(MIXTURES["deepseek_v3"]).from_dict({**MIXTURES["deepseek_v3"].to_dict(), "n_group": 2})
    with pytest.raises(UnsupportedArchitectureError, match="2 groups of experts"):
        architecture_of(grouped)
    with pytest.raises(UnsupportedArchitectureError, match="mixtures of experts"):
        architecture_of(PhimoeConfig())
    none = type(MIXTURES["qwen2_moe"]).from_dict({**MIXTURES["qwen2_moe"].to_dict(), "mlp_only_layers": [0, 1, 2]})
    with pytest.raises(UnsupportedArchitectureError, match="No layer of this model has routed experts"):
        shape_of(none)


@pytest.mark.heavy
def test_mixtures_are_loaded_without_the_package(tmp_path):
    models = {tmp_path / name: case(name).cut for name in MIXTURES}
    for directory, model in models.items():
        model.save_pretrained(directory)
    found = check_without_package(dict.fromkeys(models, IDS), tmp_path)
    for directory, model in models.items():
        torch.testing.assert_close(found[directory], logits(model, IDS), atol=1e-5, rtol=1e-5)


def test_a_plan_keeps_its_unit():
    plan = Plan.of([4, 0], [2, 2], "num_experts")
    assert plan_of(widths_of(plan)) == plan != Plan.of([4, 1], [2, 2])
    with pytest.raises(ValueError, match="from 1 on"):
        plan_of({"intermediate_size": [4, 0], "num_key_value_heads": [2, 2]})
