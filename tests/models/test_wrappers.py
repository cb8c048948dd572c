"""Text models inside models of images and text: the text model is loaded, with the wrapper's logits."""

from __future__ import annotations

import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checks import logits
from support.tiny import CONFIGS, uneven
from support.wrappers import WRAPPERS, tiny_wrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from exporters.benchmark import Passes, benchmark, compare
from exporters.format import FORMATS
from selfpruner_hub.models.loading import load_config, load_model
from selfpruner_hub.storage.offload import DiskStore

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def old_prefix(new):
    return "language_model.model." if new[1] else ""


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request, tmp_path_factory):
    """(name, wrapper with random weights, its directory)."""
    model = tiny_wrapper(request.param)
    directory = tmp_path_factory.mktemp("wrappers") / request.param
    model.save_pretrained(directory)
    return request.param, model, directory


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_text_model_says_what_the_wrapper_says(wrapper, on_disk, tmp_path):
    name, model, directory = wrapper
    words = {"store": DiskStore(tmp_path)} if on_disk else {}
    text, _ = load_model(str(directory), **words)
    assert text.config.model_type == CONFIGS[{"mistral3": "mistral"}.get(name, name)].model_type
    torch.testing.assert_close(logits(text, IDS), logits(model, IDS), atol=1e-5, rtol=1e-5)
    assert text.config.tie_word_embeddings == (name == "gemma3")


def test_the_configuration_alone_is_accepted(wrapper):
    load_config(str(wrapper[2]))


def test_it_is_timed_beside_its_pruned_text_model(wrapper, tmp_path, monkeypatch):
    """In this process: what the processes of a benchmark do besides is tested with plain models."""

    @contextmanager
    def here(runtime, name, setting):
        yield SimpleNamespace(measure=FORMATS[runtime].load(name, setting).measure, memory=dict)

    monkeypatch.setattr(compare, "started", here)
    uneven(load_model(str(wrapper[2]))[0]).save_pretrained(tmp_path)
    (case,) = benchmark(tmp_path, wrapper[2], passes=Passes(prompts=(8,), new_tokens=1, runs=2, threads=1)).cases
    assert case.prefill.ideal > 1


def test_the_names_of_older_files(wrapper, tmp_path):
    _, model, directory = wrapper
    older = {
        re.sub("^lm_head", "language_model.lm_head", re.sub(r"^model\.(language_model\.)?", old_prefix, key)): tensor
        for key, tensor in load_file(directory / "model.safetensors").items()
    }
    assert any(key.startswith("language_model.model.layers") for key in older)
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoConfig.from_pretrained(directory).save_pretrained(tmp_path)
    text, _ = load_model(str(tmp_path))
    torch.testing.assert_close(logits(text, IDS), logits(model, IDS), atol=1e-5, rtol=1e-5)


def test_the_cut_text_model_is_saved_as_a_text_model(wrapper, tmp_path):
    pruned = uneven(load_model(str(wrapper[2]))[0])
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, IDS), logits(pruned, IDS))
    assert "vision" not in (tmp_path / "config.json").read_text()
