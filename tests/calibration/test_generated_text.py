"""Text that models write: generate()'s own greedy text, ended rows that leave, fair draws, seeds."""

import pytest
import torch
from support.tiny import DISTINCT, tiny_model
from torch import nn

from selfpruner_hub.calibration import generated_text
from selfpruner_hub.calibration.generated_text import continuations, draw, sample_windows
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.models.patching import with_layers

WINDOW, NEW = 8, 20
PROMPTS = [[5], [9, 8, 7, 6, 5, 4], list(range(20, 45)), [30, 31, 32], list(range(50, 70)), [100, 3]]
"""Shorter and longer than the sliding windows of 16 tokens."""
NEVER = 1000


def greedy(model):
    """What generate() writes after each prompt on its own, by the likeliest token, with no end."""
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": NEVER, "pad_token_id": 0}
    written = [model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **options) for p in PROMPTS]
    return [ids[0, len(p) :].tolist() for p, ids in zip(PROMPTS, written, strict=True)]


def ended(ids, ends):
    """Token ids up to the first that ends them."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


@pytest.fixture
def steps(monkeypatch):
    """Rows at every step, and how many of them stay where others leave."""
    seen = []
    step = generated_text._Rows.step

    def spy(self, new, left):
        seen.append((len(new), left is not None))
        return step(self, new, left)

    monkeypatch.setattr(generated_text._Rows, "step", spy)
    monkeypatch.setattr(generated_text, "_batch_size", lambda *_: len(PROMPTS))
    return seen


@pytest.mark.parametrize("name", [name for name in DISTINCT if name != "olmo2"])  # it writes one token only
def test_the_likeliest_text_is_that_of_generate(name, steps):
    model = tiny_model(name)
    whole = greedy(model)
    assert continuations(model, PROMPTS, NEW, temperature=0) == whole
    assert steps == [(6, False)] * (NEW - 1)
    ends = {whole[0][1], whole[2][5], whole[3][11]}
    expected = [ended(ids, ends) for ids in whole]
    assert len(set(map(len, expected))) > 2
    steps.clear()
    assert continuations(model, PROMPTS, NEW, ends=ends, temperature=0) == expected


def test_ended_rows_leave_once_they_are_more_than_a_fifth(steps):
    model = tiny_model("llama")
    whole = greedy(model)
    ends = {whole[0][1], whole[2][5], whole[3][11]}
    lengths = [len(ended(ids, ends)) for ids in whole]
    continuations(model, PROMPTS, NEW, ends=ends, temperature=0)
    rows, expected = len(PROMPTS), []
    live = lengths
    for step in range(1, max(lengths)):
        gone = sum(length <= step for length in live)
        if gone > generated_text.ENDED * rows:
            live = [length for length in live if length > step]
            rows = len(live)
        expected.append(rows)
    assert [count for count, _ in steps] == expected
    assert len(set(expected)) > 2
    assert steps[0] == (6, False)


def test_no_step_is_made_when_all_have_ended(steps):
    model = tiny_model("llama")
    assert all(len(ids) == 1 for ids in continuations(model, PROMPTS, NEW, ends=range(128)))
    assert steps == []


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_room_of_the_cache_changes_nothing(name, monkeypatch):
    model = tiny_model(name)
    whole = greedy(model)
    monkeypatch.setattr(generated_text, "CACHE_STEP", 1)
    assert continuations(model, PROMPTS, NEW, temperature=0) == whole
    ends = {whole[0][1], whole[2][5], whole[3][11]}
    assert continuations(model, PROMPTS, NEW, ends=ends, temperature=0) == [ended(ids, ends) for ids in whole]


def test_a_model_without_one_of_its_blocks_writes_too():
    model = tiny_model("llama")
    shorter = nn.ModuleList(list(decoder_layers(model))[:-1])
    with with_layers(model, shorter) as cut:
        whole = continuations(cut, PROMPTS, NEW, temperature=0)
        ends = {whole[0][1], whole[2][5]}  # rows leave, and so does their part of the cache
        assert continuations(cut, PROMPTS, NEW, ends=ends, temperature=0) == [ended(ids, ends) for ids in whole]


def test_keys_and_values_are_written_in_place():
    layer, x = generated_text._GrowingLayer(), torch.arange(24.0).view(1, 2, 3, 4)
    first, _ = layer.update(x, -x)
    keys, values = layer.update(x[..., :1, :], -x[..., :1, :])
    assert keys.data_ptr() == first.data_ptr()
    assert torch.equal(keys, torch.cat([x, x[..., :1, :]], 2))
    assert torch.equal(values, -keys)
    assert layer.get_seq_length() == 4


@pytest.mark.parametrize("batch", [1, 4])
def test_batches_change_nothing_and_progress_tells_them(batch, monkeypatch):
    model, told = tiny_model("qwen3"), []
    monkeypatch.setattr(generated_text, "SAMPLE_BATCH", batch)
    written = continuations(
        model, PROMPTS, NEW, temperature=0, what="talking", progress=lambda *what: told.append(what)
    )
    assert written == greedy(model)
    assert told == [("talking", done, 6) for done in (0, *range(batch, 6, batch), 6)]


def test_the_cache_takes_no_more_than_the_weights_or_than_little(monkeypatch):
    model = tiny_model("llama")
    one = 2 * 4 * 4 * 4 * (60 + 4)  # keys and values of 4 layers, 4 groups, 4 numbers a head, 64 tokens
    fits = model.num_parameters() // one
    assert 1 < fits < 38

    def first_batch(little):
        told = []
        monkeypatch.setattr(generated_text, "SMALL_CACHE", little)
        continuations(model, [[5] * 60] * 40, 4, progress=lambda _, done, __: told.append(done))
        return told[1]

    assert first_batch(0) == fits
    assert first_batch((fits + 2) * one * model.dtype.itemsize) == fits + 2


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_banned_is_never_written(temperature):
    banned = set(range(120))
    written = continuations(tiny_model("llama"), PROMPTS * 4, NEW, banned=banned, temperature=temperature)
    assert all(len(ids) == NEW for ids in written)
    assert not banned & {token for ids in written for token in ids}


def test_an_end_is_the_last_token_of_what_it_ends():
    ends = range(100, 128)
    written = continuations(tiny_model("mistral"), PROMPTS * 20, 12, ends=ends, temperature=1)
    assert {ids[-1] in ends for ids in written} == {True, False}
    for ids in written:
        assert not set(ids[:-1]) & set(ends)
        assert len(ids) == 12 or (len(ids) < 12 and ids[-1] in ends)


@pytest.mark.parametrize("most", [1, 2])
def test_most_is_the_largest_number_of_tokens(most):
    assert [len(ids) for ids in continuations(tiny_model("llama"), PROMPTS, most)] == [most] * 6


def test_nothing_to_continue_is_nothing_written():
    assert continuations(tiny_model("llama"), [], 4) == []


def test_the_seed_decides_the_text_and_the_global_random_state_is_left_alone():
    model = tiny_model("llama")
    before = torch.random.get_rng_state()
    first, again, other = (continuations(model, PROMPTS, NEW, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [1, 0.5])
def test_draws_follow_the_distribution(temperature):
    logits = torch.tensor([-torch.inf, 0.3, 2.0, -torch.inf, 1.0, -1.0, -torch.inf])
    count = 40_000
    drawn = draw(logits.repeat(count, 1), temperature, torch.Generator().manual_seed(0))
    found, expected = drawn.bincount(minlength=7), count * (logits / temperature).softmax(0)
    possible = expected > 0
    assert found[~possible].sum() == 0
    chi_square = ((found - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert chi_square < 16.27  # 3 degrees of freedom, one in a thousand


@pytest.mark.parametrize("point", [0.0, 1 - 2**-24])
def test_no_edge_of_the_draw_is_an_impossible_token(point, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, point))
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = logits[:, 500:510] = logits[:, -40:] = -torch.inf
    drawn = draw(logits, 1.0, torch.Generator())
    assert drawn.tolist() == [3 if point == 0 else 959] * 50


def test_rows_are_drawn_each_by_its_own_distribution():
    logits = torch.full((6, 9), -torch.inf)
    places = torch.tensor([3, 0, 8, 5, 5, 1])
    logits[torch.arange(6), places] = 0
    assert torch.equal(draw(logits, 1.0, torch.Generator()), places)


def test_temperature_0_takes_the_likeliest():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, 0, torch.Generator()), logits.argmax(1))


def test_first_tokens_are_drawn_from_the_models_distribution():
    model, count = tiny_model("gemma2", final_logit_softcapping=1.0), 3000
    with torch.no_grad():
        expected = count * model(torch.tensor([PROMPTS[1]])).logits[0, -1].softmax(0)
    found = torch.tensor(continuations(model, [PROMPTS[1]] * count, 1))[:, 0].bincount(minlength=128)
    often = expected > 5
    assert often.sum() > 20
    rest = (found[~often].sum() - expected[~often].sum()) ** 2 / expected[~often].sum().clamp_min(1)
    chi_square = ((found - expected)[often] ** 2 / expected[often]).sum() + rest
    degrees = int(often.sum())
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


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


def test_sampling_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(generated_text, "SAMPLE_BATCH", 64)
    told = []
    sample_windows(tiny_model("llama"), 70, 2, seed=0, progress=lambda *what: told.append(what))
    assert told == [("sampling text", done, 70) for done in (0, 64, 70)]
