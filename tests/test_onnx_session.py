"""A bound session gives what a plain one gives, and takes what decode steps bring."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from exporters.onnx_session import BoundSession


@pytest.fixture(scope="module")
def session():
    """Puts new tokens, as numbers, behind a cache, and counts them."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["ids"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Concat", ["past", "numbers"], ["present"], axis=1),
            helper.make_node("Size", ["ids"], ["count"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [2, "new"]),
            helper.make_tensor_value_info("past", TensorProto.FLOAT, [2, "past"]),
        ],
        [
            helper.make_tensor_value_info("present", TensorProto.FLOAT, [2, "all"]),
            helper.make_tensor_value_info("count", TensorProto.INT64, []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_plain_session_gives_the_same(session):
    inputs = {"ids": torch.arange(6).view(2, 3), "past": torch.randn(2, 5)}
    found = BoundSession(session, torch.device("cpu"))(inputs)
    plain = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert list(found) == ["present", "count"]
    for value, expected in zip(found.values(), plain, strict=True):
        assert torch.equal(value, torch.as_tensor(expected))


def test_steps_from_an_empty_cache_that_keep_their_outputs(session):
    """What one step gives is what the next one reads, and stays as it is."""
    run, past, kept = BoundSession(session, torch.device("cpu")), torch.zeros(2, 0), []
    for token in range(4):
        past = run({"ids": torch.tensor([[token], [-token]]), "past": past})["present"]
        kept.append(past)
    assert [each.tolist() for each in kept] == [
        [list(range(length)), [-number for number in range(length)]] for length in (1, 2, 3, 4)
    ]


def test_inputs_may_lie_otherwise_in_memory_and_be_more_than_the_graph_takes(session):
    ids, past = torch.arange(6).view(3, 2).t(), torch.randn(5, 2).t()
    found = BoundSession(session, torch.device("cpu"))({"ids": ids, "past": past, "mask": torch.ones(2)})
    assert torch.equal(found["present"], torch.cat([past, ids.float()], 1))
