"""Targets: how they are written, what they ask for, and what is refused."""

import pytest

from selfpruner_hub.errors import UserError
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.target import parse_target, target_of

COSTS = Costs.linear(ModelShape(8, 4, 1, Plan.of([10] * 2, [2] * 2)), group=10.0, channel=3.0, constant=100.0)
"""The dense model costs 200, half of it prunable."""


@pytest.mark.parametrize(
    ("words", "cost"),
    [
        ("speedup=1.25", 160), ("latency=150", 150), ("memory=0.75", 150), ("memory=150", 150), ("memory=0.15 kB", 150),
        ("memory=0.5KiB", 512), ("kv_cache=128B", 128), ("kv_cache=0.5", 100), ("memory=200MB", 200e6),
    ],
)  # fmt: skip
def test_a_target_asks_for_a_cost(words, cost):
    target = target_of(parse_target(words), "onnx")
    assert target.wanted(COSTS) == pytest.approx(cost)
    assert target.share(COSTS) == pytest.approx((200 - cost) / 100)
    assert target.figure(target.wanted(COSTS), COSTS.dense) == pytest.approx(target.value)


@pytest.mark.parametrize(
    "words",
    [
        "speedup", "speedup=", "speedup=1", "speedup=0.5", "speedup=nan", "speedup=inf", "speedup=-2", "speedup=1.5x",
        "speedup=2MB", "latency=0", "latency=20GB", "memory=1", "memory=2TB", "kv_cache=b", "beta=0.3", "=1",
        "speedup=.",
    ],
)  # fmt: skip
def test_what_is_no_target_is_refused_in_one_line(words):
    with pytest.raises(UserError) as refused:
        target_of(parse_target(words), "onnx")
    assert "\n" not in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize("wanted", [{}, {"speedup": 1.5, "memory": 0.5}, ["speedup"], 1.5, {"speedup": True}])
def test_a_target_is_one_quantity(wanted):
    with pytest.raises(UserError):
        target_of(wanted, "onnx")


@pytest.mark.parametrize("request_", [(0, 32), (128, 0), (1.5, 2), (True, 2)])
def test_a_request_has_tokens(request_):
    with pytest.raises(UserError, match="whole number"):
        target_of({"speedup": 1.5}, "onnx", request_)


def test_figures_are_written_with_their_units():
    written = [
        target_of(parse_target(words), "onnx").said(figure)
        for words, figure in (("speedup=1.5", 1.4999), ("memory=0.5", 0.5), ("latency=80", 79.996), ("memory=1MB", 1e6))
    ]
    assert written == ["1.500", "0.500", "80.00 ms", "1,000,000 bytes"]
    assert target_of({"memory": "50GB"}, "onnx").name == "memory=50000000000"
