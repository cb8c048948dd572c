"""Plans count weights as the tensors do, and their rates average to β."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfpruner_hub.plans.plan import LayerWidths, ModelShape, Plan

SMOLLM2 = ModelShape(hidden_size=576, head_dim=64, queries_per_group=3, dense=Plan.of([1536] * 30, [3] * 30))


@st.composite
def pruned_shapes(draw):
    """A shape whose layers may differ, and a plan that keeps at least one group and one channel of each."""
    layers = draw(st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 32)), min_size=1, max_size=40))
    kept = [(draw(st.integers(1, f)), draw(st.integers(1, g))) for f, g in layers]
    shape = ModelShape(
        draw(st.integers(1, 4096)),
        draw(st.integers(1, 256)),
        draw(st.integers(1, 8)),
        Plan.of(*zip(*layers, strict=True)),
    )
    return shape, Plan.of(*zip(*kept, strict=True))


@pytest.mark.parametrize(
    ("widths", "multiple"),
    [
        ([64, 64], 1),  # a tiny model of the tests
        ([376, 376], 1),  # 8 leaves 47 widths
        ([384, 384], 8),
        ([1536, 1536], 32),  # SmolLM2-135M
        ([4864, 4864], 64),  # Qwen2.5-0.5B
        ([5632, 5632], 64),  # TinyLlama: 128 leaves 44
        ([14336, 14336], 128),  # Llama-3.1-8B
        ([14336, 1536], 32),  # every layer
        ([14337, 14337], 1),
    ],
)
def test_the_default_multiple_divides_every_width_and_leaves_enough(widths, multiple):
    assert ModelShape(64, 16, 2, Plan.of(widths, [2] * len(widths))).default_multiple == multiple


def test_plan_of_pairs_the_lists():
    plan = Plan.of([10, 20], [1, 2])
    assert plan.layers == (LayerWidths(10, 1), LayerWidths(20, 2))
    assert plan == Plan.of((10, 20), (1, 2))
    assert len({plan, Plan.of([10, 20], [1, 2])}) == 1  # usable as a key


def test_plan_of_refuses_lists_of_unequal_length():
    with pytest.raises(ValueError):
        Plan.of([10, 20], [1])


def test_a_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Plan.of([10], [1]).layers[0].intermediate_size = 5


def test_weights_of_smollm2_equal_its_matrices():
    q_and_o, k_and_v, ffn = 2 * 576 * 576, 2 * 576 * (3 * 64), 3 * 576 * 1536
    assert SMOLLM2.num_layers == 30
    assert SMOLLM2.layer_weights(SMOLLM2.dense.layers[0]) == q_and_o + k_and_v + ffn
    assert SMOLLM2.weights(SMOLLM2.dense) == 30 * (q_and_o + k_and_v + ffn)


def test_rates_and_beta_of_a_hand_made_plan():
    shape = ModelShape(hidden_size=10, head_dim=3, queries_per_group=2, dense=Plan.of([12, 12], [2, 2]))
    assert (shape.unit_weights, shape.group_weights) == (30, 180)  # gate, up, down; q + q + k + v + o + o
    plan = Plan.of([6, 12], [1, 2])  # the first layer keeps half of both parts
    assert shape.rates(plan) == pytest.approx((0.5, 0))
    assert shape.beta(plan) == pytest.approx(0.25)


def test_an_ffn_without_gate_has_two_matrices():
    shape = ModelShape(10, 3, 2, Plan.of([12], [2]), ffn_matrices=2)
    assert shape.unit_weights == 20
    assert shape.weights(shape.dense) == 12 * 20 + 2 * 180


def test_rates_refuse_a_plan_of_another_depth():
    with pytest.raises(ValueError):
        SMOLLM2.rates(Plan.of([1536], [3]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pruned_shapes())
def test_beta_is_the_mean_of_the_rates_by_weight(pruned):
    shape, plan = pruned
    rates, sizes = shape.rates(plan), [shape.layer_weights(w) for w in shape.dense.layers]
    assert all(0 <= r < 1 for r in rates)
    mean = sum(r * n for r, n in zip(rates, sizes, strict=True)) / sum(sizes)
    assert shape.beta(plan) == pytest.approx(mean, abs=1e-9)
    assert shape.rates(shape.dense) == (0,) * shape.num_layers


@pytest.mark.parametrize("matrices", [2, 3])
def test_a_shape_is_filed_with_what_a_group_and_a_channel_weigh(matrices):
    shape = replace(SMOLLM2, ffn_matrices=matrices)
    record = json.loads(json.dumps(shape.record()))
    assert ModelShape.of_record(record) == shape
    assert record["channel_weights"] == matrices * 576
    assert record["group_weights"] == 2 * 576 * 64 * 4


def test_the_hash_of_a_plan_is_of_its_numbers():
    """A text has another hash in each process, and sets of plans another order then."""
    plan = Plan.of([8, 4], [2, 1])
    assert hash(plan) == hash((plan.layers,)) == hash(replace(plan, ffn_unit="num_experts"))
