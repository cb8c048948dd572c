"""The order of a user's model: whatever ends the work, the model has its own order afterwards."""

from __future__ import annotations

import signal

import pytest
import torch
from support.tiny import tiny_model

from selfpruner_hub.interrupts import uninterrupted
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.pruning import ordering
from selfpruner_hub.pruning.importance import LayerOrder
from selfpruner_hub.pruning.ordering import ordered, permute


@pytest.fixture(autouse=True)
def interruptible():
    """A process that a shell started in the background ignores interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def case():
    """A model, its weights, and an order that moves all of them, and that does not undo itself."""
    model = tiny_model("llama")
    shape = shape_of(model.config)
    order = [
        LayerOrder(torch.arange(w.num_key_value_heads).roll(1), torch.arange(w.intermediate_size).roll(1))
        for w in shape.dense.layers
    ]
    return model, {key: value.clone() for key, value in model.state_dict().items()}, order


def unchanged(model, weights):
    return all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def at_call(number, act, monkeypatch):
    """Act at the so-manieth weight that is to be moved."""
    moves, calls = ordering._moves, []

    def watched(model, order):
        for move in moves(model, order):
            calls.append(move)
            if len(calls) == number:
                act()
            yield move

    monkeypatch.setattr(ordering, "_moves", watched)
    return calls


def interrupt():
    signal.raise_signal(signal.SIGINT)


WEIGHTS = 4 * (5 + 3 + 2)
"""Weights and biases that are moved in the four layers of the tiny model."""


@pytest.mark.parametrize("number", [1, 13, WEIGHTS, WEIGHTS + 1, WEIGHTS + 17, 2 * WEIGHTS])
def test_an_interrupt_at_any_weight(number, case, monkeypatch):
    """Of those that are put into order, and of those that are put back."""
    model, weights, order = case
    calls = at_call(number, interrupt, monkeypatch)
    entered = []
    with pytest.raises(KeyboardInterrupt), ordered(model, order):
        entered.append(not unchanged(model, weights))
    assert len(calls) == 2 * WEIGHTS
    assert entered == ([] if number <= WEIGHTS else [True])
    assert unchanged(model, weights)


@pytest.mark.parametrize("number", [1, 13, WEIGHTS])
def test_too_little_memory_at_any_weight(number, case, monkeypatch):
    model, weights, order = case

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    at_call(number, fail, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError), ordered(model, order):
        pytest.fail("it was not put into order")
    assert unchanged(model, weights)


def test_what_is_put_into_order_and_back_is_the_same(case):
    model, weights, order = case
    permute(model, order)
    assert not unchanged(model, weights)
    permute(model, [each.inverse() for each in order])
    assert unchanged(model, weights)


def test_an_interrupt_that_is_held_back_comes_once_at_the_end():
    done = []

    def work():
        with uninterrupted():
            interrupt()
            interrupt()
            done.append(1)
        done.append(2)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]
    with pytest.raises(KeyboardInterrupt):  # the handler is back
        interrupt()
