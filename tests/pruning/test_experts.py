"""Order, curves and repair of experts, against routing them anew."""

from __future__ import annotations

import functools

import pytest
import torch
from support.checks import logits
from support.mixtures import MIXTURES, tiny_mixture

from selfpruner_hub.calibration.fisher import output_fisher
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import architecture_of, shape_of
from selfpruner_hub.models.layer_stream import Stream
from selfpruner_hub.models.mixtures.routing import Routing
from selfpruner_hub.pruning import expert_repair, experts
from selfpruner_hub.pruning.experts import SCORES, errors_by_count, rank_experts
from selfpruner_hub.pruning.joint_fit import Summed, fit_together
from selfpruner_hub.pruning.least_squares import LinearFit
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import Slicer, slice_model

WINDOWS = torch.randint(3, 128, (48, 32), generator=torch.Generator().manual_seed(1))
TOKENS, EXPERTS, SIZE, TOP_K = 40, 7, 5, 2


def routing(divided_by: str, bias: bool = False, scale: float = 1.0) -> Routing:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(TOKENS, EXPERTS, generator=generator).exp()
    return Routing(weights, torch.randn(EXPERTS, generator=generator) if bias else None, TOP_K, divided_by, scale)


OUTPUTS = torch.randn(TOKENS, EXPERTS, SIZE, generator=torch.Generator().manual_seed(4))


def error_with(found: Routing, alive: torch.Tensor) -> float:
    """Mean squared change of the output, by masking and routing again."""
    whole, left = (
        (found.gates(mask)[..., None] * OUTPUTS).sum(1) for mask in (torch.ones_like(alive), alive)
    )  # fmt: skip
    return float((left - whole).square().sum(-1).mean())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("divided_by", ["chosen", "alive", "nothing"])
def test_errors_are_those_of_routing_anew_among_the_experts_that_are_left(divided_by, bias):
    found, order = routing(divided_by, bias, scale=1.5), torch.tensor([5, 4, 3, 2, 0, 1, 6])
    errors = errors_by_count(found, OUTPUTS, order)
    assert errors[EXPERTS] == 0
    for count in range(EXPERTS):
        alive = torch.zeros(EXPERTS, dtype=torch.bool)
        alive[order[:count]] = True
        assert errors[count] == pytest.approx(error_with(found, alive), rel=1e-4)
        assert errors[count] > 0


def test_scores_are_those_of_their_papers():
    gates = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.0, 0.0], [0.1, 0.0, 0.0]])
    lengths = torch.tensor([[2.0, 4.0, 1.0], [1.0, 9.0, 1.0], [1.0, 9.0, 1.0]])
    assert experts.frequency(gates, lengths).tolist() == [3, 1, 0]
    torch.testing.assert_close(experts.reap(gates, lengths), torch.tensor([2.0 / 3, 2.0, 0.0]))
    torch.testing.assert_close(experts.reap_sum(gates, lengths), torch.tensor([2.0, 2.0, 0.0]))


@functools.cache
def known(name: str):
    model = tiny_mixture(name)
    return model, output_fisher(model, WINDOWS[:8])


@pytest.mark.parametrize("importance", SCORES)
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_orders_hold_all_experts_and_curves_end_at_nothing(name, importance):
    model, fisher = known(name)
    orders, curves = rank_experts(model, WINDOWS, importance, fisher)
    for order, curve, w in zip(orders, curves, shape_of(model.config).dense.layers, strict=True):
        assert sorted(order.channels.tolist()) == list(range(w.intermediate_size))
        assert len(curve.ffn) == w.intermediate_size + 1
        assert len(curve.attention) == w.num_key_value_heads + 1
        assert curve.ffn[-1] == 0 == curve.attention.max()
        if w.intermediate_size:
            assert min(curve.ffn[:2]) > curve.ffn[-2] > 0


def test_an_unknown_importance_is_refused():
    with pytest.raises(UserError, match="Unknown importance 'obs' of experts"):
        rank_experts(known("qwen2_moe")[0], WINDOWS, "obs")


def test_the_curve_predicts_the_error_of_the_cut_layer():
    """Of its output, in the last layer, where nothing comes after it: half of the squared error, as R sees it."""
    model, fisher = known("qwen3_moe")
    orders, curves = rank_experts(model, WINDOWS, "reap-sum", fisher)
    shape, last = shape_of(model.config), len(curves) - 1
    widths = [w.intermediate_size for w in shape.dense.layers]
    widths[last] = 4
    plan = shape.plan(widths, [w.num_key_value_heads for w in shape.dense.layers])
    seen = []

    def keep(_module, _args, output):
        seen.append(output.flatten(0, -2))

    with ordered(model, orders):
        cut = slice_model(Slicer(model), plan)
    for each in (model, cut):
        handle = each.model.layers[last].mlp.register_forward_hook(keep)
        logits(each, WINDOWS)
        handle.remove()
    lost = ((seen[0] - seen[1]) @ fisher[last][1].t()).square().sum(-1).mean() / 2
    assert curves[last].ffn[4] == pytest.approx(lost.item(), rel=1e-3)


def test_a_sketch_keeps_errors(monkeypatch):
    model, fisher = known("mixtral")
    exact = rank_experts(model, WINDOWS, "reap-sum", fisher)[1]
    monkeypatch.setattr(experts, "SKETCH", 24)
    near = rank_experts(model, WINDOWS, "reap-sum", fisher)[1]
    for a, b in zip(exact, near, strict=True):
        assert not (a.ffn[:-1] == b.ffn[:-1]).any()
        assert b.ffn[:-1] == pytest.approx(a.ffn[:-1], rel=0.5)


def test_projections_are_fitted_together_as_one():
    """Conjugate gradients reach what a Cholesky factor of all inputs gives, without a ridge and a choice of it."""
    generator = torch.Generator().manual_seed(5)
    sizes, outputs, windows, width = (4, 3), 6, 64, 8
    x = torch.randn(windows, width, 7, generator=generator)
    x[..., 4:] += x[..., :3]  # what one projection reads tells of the other
    true = torch.randn(outputs, 7, generator=generator)
    rest = x @ true.t() + 0.1 * torch.randn(windows, width, outputs, generator=generator)
    everything = torch.arange(windows * width)

    def stream():
        flat = x.flatten(0, 1)
        yield Summed([(0, everything, flat[:, :4]), (1, everything, flat[:, 4:])], rest)

    found = torch.cat(fit_together(stream, sizes, outputs), 1)
    joint = torch.nn.Linear(7, outputs, bias=False)
    joint.weight.data.zero_()
    fit = LinearFit(joint, [1e-6])
    fit.add(x, rest)
    with torch.no_grad():
        fit.apply()
    torch.testing.assert_close(found, joint.weight.data, atol=0.03, rtol=0.03)


def test_without_windows_to_hold_out_nothing_is_changed():
    x = torch.randn(2, 8, 3)
    batch = Summed([(0, torch.arange(16), x.flatten(0, 1))], torch.randn(2, 8, 4))
    (change,) = fit_together(lambda: [batch], [3], 4)
    assert change.shape == (4, 3)
    assert not change.any()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "ernie4_5_moe"])
def test_what_the_repair_fits_is_the_output_of_the_block(name):
    """Inputs of all projections, times gates and weights, summed: shared expert included."""
    model = tiny_mixture(name)
    row, layer = architecture_of(model.config).experts, model.model.layers[1]
    with torch.no_grad():
        streams = Stream(model, WINDOWS[:8]), Stream(model, WINDOWS[:8])
        repair = expert_repair._Repair(row, layer, 1, *streams, 1.0)
        (batch,) = repair._seen()
        parts, rest = repair._summed(*batch)
        found = torch.zeros_like(rest).flatten(0, 1)
        for block, tokens, x in parts:
            found.index_add_(0, tokens, x @ repair._weights[block].t())
        wanted = layer.get_submodule(row.block)(batch[0]).flatten(0, 1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_repair_lowers_the_damage(name, direct, monkeypatch):
    if not direct:
        if name not in ("qwen2_moe", "gpt_oss"):
            pytest.skip("one shape of tensors stands for the others")
        monkeypatch.setattr(expert_repair, "DIRECT", 0)
    model, fisher = known(name)
    orders, _ = rank_experts(model, WINDOWS, "reap-sum", fisher)
    shape = shape_of(model.config)
    groups = [w.num_key_value_heads for w in shape.dense.layers]
    plan = shape.plan([w.intermediate_size // 2 for w in shape.dense.layers], groups)
    with ordered(model, orders):
        cut = slice_model(Slicer(model), plan)
    wanted, before = logits(model, WINDOWS), logits(cut, WINDOWS)
    weights = {k: v.clone() for k, v in cut.state_dict().items()}
    compensate(model, cut, WINDOWS, fisher=fisher)
    after = logits(cut, WINDOWS)
    assert (after - wanted).square().mean() < 0.97 * (before - wanted).square().mean()
    changed = [key for key, value in cut.state_dict().items() if not torch.equal(value, weights[key])]
    assert changed
    assert all("down_proj" in key or "output_linear" in key for key in changed)
    assert not any("bias" in key for key in changed)
