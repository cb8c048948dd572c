"""Models that were saved before the file beside their weights held one family and named a decoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.checks import check_without_package, logits
from support.tiny import tiny_pruned, tiny_tokenizer
from transformers import AutoModelForCausalLM

CODE = "modeling_selfpruned.py"
FORMER = Path(__file__).parent / "former" / CODE
"""What was written beside the weights then."""
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def former(tmp_path_factory):
    """Models by their directories in the former layout."""
    models = {}
    for name in ("llama", "gemma3"):
        directory = tmp_path_factory.mktemp("former") / name
        models[directory] = tiny_pruned(name)
        models[directory].save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
        shutil.copy(FORMER, directory / CODE)
        config = json.loads((directory / "config.json").read_text())
        config["auto_map"] = {key: config["auto_map"][key] for key in ("AutoConfig", "AutoModelForCausalLM")}
        (directory / "config.json").write_text(json.dumps(config))
    return models


def test_they_load_with_the_package(former):
    for directory, model in former.items():
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory).eval(), IDS), logits(model, IDS))


@pytest.mark.heavy
def test_they_load_without_the_package(former, tmp_path):
    found = check_without_package(dict.fromkeys(former, IDS), tmp_path)
    for directory, model in former.items():
        torch.testing.assert_close(found[directory], logits(model, IDS), atol=1e-5, rtol=1e-5)


def test_saved_again_they_name_their_decoders(former, tmp_path):
    for directory in former:
        AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / directory.name)
        assert "AutoModel" in json.loads((tmp_path / directory.name / "config.json").read_text())["auto_map"]
        assert (tmp_path / directory.name / CODE).read_text() != FORMER.read_text()
