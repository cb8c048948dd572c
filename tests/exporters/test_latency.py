"""Timing: who runs when, what is counted, and that a model is really run as the figures say."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model, tiny_pruned

from exporters.benchmark.latency import interleaved, timing
from exporters.runtime import CausalLMRunner, Measured

IDS = torch.arange(3, 23)[None]


class Scripted:
    """Says that its passes took what a script says, and logs them."""

    def __init__(self, name, log, prefill):
        self.name, self.log, self.prefill = name, log, iter(prefill)

    def measure(self, ids, new_tokens):
        self.log.append((self.name, tuple(ids.shape), new_tokens))
        return Measured(next(self.prefill) if new_tokens > 1 else 1000.0, 1.0)


def test_models_take_turns_and_what_warms_up_does_not_count():
    log, ticks = [], []
    runners = [Scripted("a", log, [99, 1, 2, 3]), Scripted("b", log, [99, 4, 5, 6])]
    first, second = interleaved(runners, IDS, 4, runs=3, warmup=1, progress=lambda: ticks.append(1))
    assert log == [(name, (1, 20), tokens) for name in "ab" for tokens in (1, 4)] * 4
    assert [m.prefill for m in first] == [1, 2, 3]
    assert [m.prefill for m in second] == [4, 5, 6]
    assert len(ticks) == 8


def test_a_timing_is_median_and_interquartile_range():
    assert timing([4.0, 1.0, 2.0, 3.0, 100.0]).median == 3.0
    assert timing([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).spread == 4.0
    assert timing([1.0, 1.0]).runs == 2


@pytest.mark.parametrize("make", [tiny_model, tiny_pruned])
def test_a_pass_reads_the_prompt_once_and_each_token_alone(make):
    model, seen = make("qwen3"), []
    plain = model.forward

    def forward(**inputs):
        seen.append((tuple(inputs["input_ids"].shape), inputs.get("cache"), inputs["logits_to_keep"]))
        return plain(**inputs)

    model.forward = forward
    measured = CausalLMRunner(model).measure(IDS.repeat(2, 1), 3)
    assert measured.prefill > 0
    assert measured.decode > 0
    assert [shape for shape, *_ in seen] == [(2, 20), (2, 1), (2, 1), (2, 1)]
    assert seen[0][1] is None
    assert all(cache is not None for _, cache, _ in seen[1:])
    assert {kept for *_, kept in seen} == {1}
    assert seen[-1][1].get_seq_length() == 23


def test_the_tokens_are_those_of_greedy_generation():
    model, fed = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda _module, _args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    CausalLMRunner(model).measure(IDS, 4)
    written = torch.cat(fed[1:], dim=1)
    mask = torch.ones_like(IDS)
    expected = model.generate(IDS, attention_mask=mask, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert written.tolist() == expected[:, 20:].tolist()
