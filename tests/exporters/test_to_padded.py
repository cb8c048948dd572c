"""Zero-padded twins: any stock runtime loads them, and they compute the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from support.checks import check_cache, check_left_padding, logits
from support.processes import run_python
from support.tiny import CONFIGS, save_tiny, tiny_model, tiny_pruned, tiny_tokenizer
from transformers import AutoModelForCausalLM

from exporters.export import export, export_model
from exporters.to_padded.writer import REMARK, padded_model
from selfpruner_hub.errors import ExportError, UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.weights import is_tied
from selfpruner_hub.storage.export_record import read_export

IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width", ["widest", "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_twin_is_stock_and_computes_the_same(name, width, tmp_path):
    model = tiny_pruned(name)
    export_model(model, tiny_tokenizer(), "padded", tmp_path / "out", width=width)
    record = read_export(tmp_path / "out", "padded")
    assert record.max_difference <= 1e-4
    assert record.remark == REMARK
    assert "no speed" in record.remark
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == CONFIGS[name].model_type
    assert not {"auto_map", "per_layer_config"} & set(config)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(twin) is type(tiny_model(name))
    torch.testing.assert_close(logits(twin, IDS), logits(model, IDS), atol=1e-4, rtol=0)
    own, padded = shape_of(model.config).dense.layers, shape_of(twin.config).dense.layers
    assert len(set(own)) > 2
    assert len(set(padded)) == 1
    widest = max(w.intermediate_size for w in own) if width == "widest" else CONFIGS[name].intermediate_size
    assert padded[0].intermediate_size == widest
    assert padded[0].num_key_value_heads == CONFIGS[name].num_key_value_heads


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_decide_whether_the_twin_is_tied(tied):
    """The configuration says the opposite: a head was replaced, or shared, after the model was built."""
    model = tiny_pruned("llama-mha-tied" if not tied else "llama")
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    outputs.weight = inputs.weight if tied else torch.nn.Parameter(inputs.weight.flip(0))
    twin = padded_model(model)
    assert is_tied(twin) == twin.config.tie_word_embeddings == tied
    torch.testing.assert_close(logits(twin, IDS), logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_the_twin_generates(name):
    twin = padded_model(tiny_pruned(name))
    check_cache(twin, IDS[:, :10])
    check_left_padding(twin, IDS[:, :20], pad=0)


def test_the_model_is_left_as_it_is():
    model = tiny_pruned("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    padded_model(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "allowed"), [("float16", 0.05), ("bfloat16", 0.5)])
def test_narrower_weights(dtype, allowed, tmp_path):
    export_model(tiny_pruned("llama"), tiny_tokenizer(), "padded", tmp_path / "out", dtype=dtype)
    record = read_export(tmp_path / "out")
    assert 0 < record.max_difference < allowed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


def test_a_dense_model_comes_out_as_it_was(tmp_path):
    dense = save_tiny("mistral", tmp_path / "dense")
    export(dense, "padded", tmp_path / "out")
    again, before = (AutoModelForCausalLM.from_pretrained(d) for d in (tmp_path / "out", dense))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in before.state_dict().items())


def test_nothing_is_left_of_a_twin_that_differs(tmp_path, monkeypatch):
    def spoilt(tensor, before, after):  # pads the next block's rows into the wrong place
        return torch.cat([tensor, tensor.new_zeros(sum(after) - sum(before), *tensor.shape[1:])]).roll(1, 0)

    monkeypatch.setattr("exporters.padding.pad_rows", spoilt)
    with pytest.raises(ExportError, match="differs from the PyTorch model"):
        export_model(tiny_pruned("phi3"), tiny_tokenizer(), "padded", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="Unknown width 'wide'.*widest, dense"):
        export_model(tiny_pruned("llama"), None, "padded", tmp_path / "out", width="wide")
    with pytest.raises(UserError, match="Unknown dtype 'int8'"):
        export_model(tiny_pruned("llama"), None, "padded", tmp_path / "out", dtype="int8")
    assert not list(tmp_path.iterdir())


LOAD = """
import sys, torch
sys.modules["selfpruner_hub"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[2])
"""


@pytest.mark.heavy
def test_loaded_without_the_package_and_without_remote_code(tmp_path):
    model = tiny_pruned("qwen3")
    export_model(model, tiny_tokenizer(), "padded", tmp_path / "out")
    torch.save(IDS, tmp_path / "ids.pt")
    done = run_python(LOAD, tmp_path / "out", tmp_path / "ids.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "ids.pt"), logits(model, IDS), atol=1e-4, rtol=0)
