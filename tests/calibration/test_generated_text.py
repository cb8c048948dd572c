"""Sampling: seeded, without special tokens, telling how far it is."""

import torch
from support.tiny import tiny_model

from selfpruner_hub.calibration.generated_text import sample_windows

WINDOW = 8


def test_sampling_is_seeded_and_leaves_the_global_random_state_alone():
    model = tiny_model("llama")
    before = torch.random.get_rng_state()
    first, again, other = (sample_windows(model, 4, WINDOW, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sampling_with_several_end_tokens_and_no_start_token():
    model = tiny_model("llama")
    ends = list(range(2, 100))  # so many that sampling would meet one
    model.config.bos_token_id, model.config.eos_token_id = None, ends
    model.generation_config.eos_token_id = list(range(2, 110))
    windows = sample_windows(model, 3, WINDOW, seed=0)
    assert windows.shape == (3, WINDOW)
    assert not {0, *range(2, 110)} & set(windows.flatten().tolist())


def test_sampling_tells_how_far_it_is():
    told = []
    sample_windows(tiny_model("llama"), 70, 2, seed=0, progress=lambda *what: told.append(what))
    assert told == [("sampling text", done, 70) for done in (0, 64, 70)]
