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


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def former(request, tmp_path_factory):
    """(directory in the former layout, its model)."""
    directory, model = tmp_path_factory.mktemp("former") / request.param, tiny_pruned(request.param)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    shutil.copy(FORMER, directory / CODE)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {key: config["auto_map"][key] for key in ("AutoConfig", "AutoModelForCausalLM")}
    (directory / "config.json").write_text(json.dumps(config))
    return directory, model


def test_it_loads_with_the_package(former):
    directory, model = former
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory).eval(), IDS), logits(model, IDS))


@pytest.mark.heavy
def test_it_loads_without_the_package(former, tmp_path):
    directory, model = former
    found = check_without_package({directory: IDS}, tmp_path)[directory]
    torch.testing.assert_close(found, logits(model, IDS), atol=1e-5, rtol=1e-5)


def test_saved_again_it_names_its_decoder(former, tmp_path):
    AutoModelForCausalLM.from_pretrained(former[0]).save_pretrained(tmp_path)
    assert "AutoModel" in json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert (tmp_path / CODE).read_text() != FORMER.read_text()
