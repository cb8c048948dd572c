"""The comparison that every export must pass: what it notices, what it overlooks, and what it leaves in memory."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from support.tiny import tiny_pruned
from support.trained import VOCABULARY, trained_tokenizer

from exporters.export import export_model
from exporters.parity import (
    DECODE_STEPS,
    PROMPT_LENGTHS,
    expected,
    greedy,
    kl_divergence,
    likely,
    logit_difference,
    own_text,
)
from selfpruner_hub.storage.export_record import read_export


def other(change):
    """The tiny model with one weight of its third layer changed."""
    model = tiny_pruned("llama")
    weight = model.model.layers[2].mlp.down_proj.weight.data
    weight[0, 0] = change(weight[0, 0])
    return model


def test_a_model_is_itself():
    model = tiny_pruned("llama")
    passes = expected(model)
    prefill = (len(PROMPT_LENGTHS), max(PROMPT_LENGTHS))
    assert [tuple(step.input_ids.shape) for step in passes] == [prefill] + [(3, 1)] * DECODE_STEPS
    assert passes[-1].attention_mask.sum(1).tolist() == [length + DECODE_STEPS for length in PROMPT_LENGTHS]
    assert logit_difference(passes, model) == 0


@pytest.mark.parametrize("change", [0.5, 1e-2])
def test_another_weight_is_noticed(change):
    assert logit_difference(expected(tiny_pruned("llama")), other(lambda weight: weight + change)) > 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_near(value):
    assert math.isnan(logit_difference(expected(tiny_pruned("llama")), other(lambda _: value)))


def test_only_cached_steps_differ():
    """A runtime that forgets its cache is found out."""
    model = tiny_pruned("llama")

    def forgetful(cache, **inputs):
        return model(**inputs) if cache is None else model(**{**inputs, "attention_mask": None}, cache=None)

    assert logit_difference(expected(model, steps=0), forgetful) == 0
    assert logit_difference(expected(model), forgetful) > 1e-3


def wrong(model, at, row, position, by):
    """The model, but for one logit of one pass."""
    calls = iter(range(DECODE_STEPS + 1))

    def call(**inputs):
        out = model(**inputs)
        if next(calls) == at:
            out.logits[row, position, 7] += by
        return out

    return call


@pytest.mark.parametrize("by", [1.0, -1.0])
@pytest.mark.parametrize(
    ("at", "row", "position"),
    [
        *((0, 0, 0), (0, 0, -2), (0, 1, -PROMPT_LENGTHS[1]), (0, 2, -1)),
        *((step, 1, -1) for step in range(1, DECODE_STEPS + 1)),
    ],
)
def test_one_logit_of_a_real_token_is_noticed_wherever_it_is(at, row, position, by):
    """In any pass, at any position, too great or too small."""
    model = tiny_pruned("llama")
    assert logit_difference(expected(model), wrong(model, at, row, position, by)) == pytest.approx(1, abs=1e-4)


def test_large_logits_are_compared_in_proportion():
    """float16 has steps of 1/16 above 64: no export could come nearer there."""
    model = tiny_pruned("llama")
    model.lm_head.weight.data *= 1000
    passes = expected(model)
    largest = passes[1].logits[1, -1].abs().max().item()
    assert largest > 64
    assert logit_difference(passes, wrong(model, 1, 1, -1, 1.0)) == pytest.approx(32 / largest, rel=1e-3)


def test_an_export_that_does_not_look_at_the_mask_is_noticed():
    """The prompts are of unequal lengths, so that there is something to mask, in every pass."""
    model = tiny_pruned("llama")
    passes = expected(model)
    assert all((step.attention_mask == 0).any() for step in passes)

    def unmasked(attention_mask, **inputs):
        return model(attention_mask=torch.ones_like(attention_mask), **inputs)

    for step in range(len(passes)):
        assert logit_difference(passes[: step + 1], unmasked) > 1e-3


def test_padding_is_overlooked():
    model = tiny_pruned("llama")

    def noisy(attention_mask, **inputs):
        out = model(attention_mask=attention_mask, **inputs)
        out.logits[attention_mask[:, -out.logits.shape[1] :] == 0] = 1e9
        return out

    assert logit_difference(expected(model), noisy) == 0


@pytest.mark.parametrize("consume", [False, True])
def test_weights_are_let_go_once_they_are_written(consume, tmp_path):
    model = tiny_pruned("llama", vocab_size=VOCABULARY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, trained_tokenizer(), "gguf", tmp_path / "out", dtype="f32", consume=consume)
    assert read_export(tmp_path / "out").max_difference <= 1e-3
    assert any(tensor.any() for tensor in model.parameters()) != consume  # pages that were given back are zeros
    if not consume:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_compared_where_any_difference_is_allowed(tmp_path, monkeypatch):
    """What a meter exports to time it is not run for its logits, and its record claims nothing."""
    model = tiny_pruned("llama", vocab_size=VOCABULARY)
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("the model was run"))
    export_model(model, trained_tokenizer(), "gguf", tmp_path / "out", tolerance=math.inf)
    record = read_export(tmp_path / "out")
    assert record.max_difference is None
    assert math.isfinite(record.tolerance)
    assert record.unchecked == "any difference was allowed"


def test_divergence_is_that_of_the_probabilities():
    model = tiny_pruned("llama")
    passes = expected(model, steps=0, text=own_text(model))
    assert kl_divergence(passes, model) == 0

    def surer(**inputs):
        out = model(**inputs)
        out.logits = out.logits * 1.5
        return out

    real = passes[0].attention_mask.bool()
    ours, theirs = (factor * passes[0].logits[real] for factor in (1, 1.5))
    kl = torch.nn.functional.kl_div(theirs.log_softmax(-1), ours.softmax(-1), reduction="none").sum(-1)
    assert kl_divergence(passes, surer) == pytest.approx(kl.mean().item(), rel=1e-3)
    assert math.isnan(kl_divergence(expected(model), other(lambda _: math.nan)))


@pytest.mark.parametrize("steps", [1, DECODE_STEPS])
def test_divergence_is_of_every_pass_and_of_real_tokens_alone(steps):
    model = tiny_pruned("llama")
    calls = iter(range(DECODE_STEPS + 1))

    def noisy(attention_mask, **inputs):
        out = model(attention_mask=attention_mask, **inputs)
        out.logits[attention_mask[:, -out.logits.shape[1] :] == 0] = 1e9
        if next(calls) == steps:
            out.logits[..., 7] += 5
        return out

    assert kl_divergence(expected(model, steps=steps - 1), noisy) == 0
    calls = iter(range(DECODE_STEPS + 1))
    assert kl_divergence(expected(model, steps=steps), noisy) > 1e-3


def test_a_models_own_text_is_its_own():
    """The prompts of the comparison are what the model writes, not random tokens."""
    model = tiny_pruned("llama")
    text = own_text(model)
    assert text.shape == (len(PROMPT_LENGTHS), max(PROMPT_LENGTHS))
    assert expected(model, text=text)[0].input_ids.equal(text)
    assert own_text(model).equal(text)


def test_a_token_is_likely_from_a_twentieth_of_the_likeliest_on():
    probabilities = torch.tensor([[0.6, 0.031, 0.029, 0.34], [0.05, 0.9, 0.04, 0.01]])
    assert likely(probabilities.log()).tolist() == [[True, True, False, True], [True, True, False, False]]


def test_a_batch_ends_when_all_of_its_sequences_have():
    written = iter([[7, 5], [5, 6], [5, 7], [5, 5]])

    def model(input_ids, **_inputs):
        logits = torch.nn.functional.one_hot(torch.tensor(next(written)), 8).float()
        return SimpleNamespace(logits=logits[:, None].expand(-1, input_ids.shape[1], -1), cache=None)

    prompts = torch.ones(2, 3, dtype=torch.long)
    passes = greedy(model, prompts, prompts, steps=5, end={7})
    assert [step.next_tokens.flatten().tolist() for step in passes] == [[7, 5], [5, 6], [5, 7]]
