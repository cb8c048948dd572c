"""Models changed for a while: decoding by one product a KV group, and the state of a model that is worked on."""

from __future__ import annotations

import threading

import pytest
import torch
from support.tiny import DISTINCT, tiny_model

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.patching import attending_by_group, working_on

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def written(model):
    """Logits of each step that follows a prompt, `[B, steps, V]`."""
    out = model.generate(
        IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", DISTINCT)
def test_it_writes_the_same(name):
    model = tiny_model(name)
    wanted = written(model)
    with attending_by_group(model):
        found = written(model)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_heads_of_a_group_are_rows_of_one_product(monkeypatch):
    asked, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        asked.append((query.shape[1:3], key.shape[1], kwargs.get("enable_gqa", False)))
        return attend(query, key, value, **kwargs)

    model = tiny_model("llama")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with attending_by_group(model):
        written(model)
    prompt, steps = asked[:4], asked[4:]
    assert {groups for _, groups, _ in prompt} == {4}  # as transformers does it
    assert len(steps) == 3 * 4
    assert set(steps) == {((4, 2), 4, False)}  # 8 heads over 4 groups: 2 rows each


def test_how_a_model_attends_is_left_as_it_was():
    model = tiny_model("llama")

    def interrupted():
        with attending_by_group(model):
            assert model.config._attn_implementation != "sdpa"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_does_not_attend_by_sdpa_is_left_alone():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with attending_by_group(model):
        assert model.config._attn_implementation == "eager"


def test_a_model_that_is_worked_on_is_in_eval_mode_and_gets_its_own_back():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert set(before) == {True, False}

    def interrupted():
        with working_on(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [module.training for module in model.modules()] == before


def test_the_modes_of_the_caller_do_not_matter():
    with torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with working_on(tiny_model("llama")):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")


def test_the_default_device_of_the_caller_does_not_matter():
    model = tiny_model("llama")
    with torch.device("meta"), working_on(model):
        assert torch.randperm(3, generator=torch.Generator()).device.type == "cpu"


def in_a_thread(work):
    """What the work says in another thread: None, or its error."""
    said = []

    def run():
        try:
            said.append(work())
        except UserError as error:
            said.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return said[0]


def test_one_thread_at_a_time_works_on_a_model():
    one, two = tiny_model("llama"), tiny_model("llama")

    def enter(*models):
        with working_on(*models):
            pass

    with working_on(one):
        with working_on(two, one):  # it may enter again
            pass
        assert "Another thread works on this model" in str(in_a_thread(lambda: enter(two, one)))
        assert in_a_thread(lambda: enter(two)) is None  # and what was held of the refused pair is free
    assert in_a_thread(lambda: enter(one)) is None
