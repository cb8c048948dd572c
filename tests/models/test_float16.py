"""A float16 checkpoint is pruned in bfloat16 from the start, and a line says so; nothing is pruned in float16."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner, PrunedModel
from selfpruner_hub.cli import main
from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.models.loading import load_model

TEXT = [" ".join(f"{a} {b} fox {a * b}" for a in range(30) for b in range(20))]
SMALL = {"window": 32, "calibration_tokens": 1024, "fitness_tokens": 256, "fisher_tokens": 256, "progress": False}
LINE = "is in float16, whose range may be too small for a cut model: it is pruned and saved in bfloat16"


@pytest.fixture
def checkpoint(tmp_path):
    """A llama, saved in float16."""
    return saved(tmp_path / "half", "llama")


def saved(directory, name, outlier=1.0):
    """Save a tiny model in float16 whose norms scale two channels, as those of real models do."""
    model = tiny_model(name)
    with torch.no_grad():
        for layer in decoder_layers(model):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                if hasattr(layer, norm):
                    getattr(layer, norm).weight[:2] *= outlier
    model.half().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["llama", "olmo2", "qwen3"])
def test_it_is_pruned_in_bfloat16_to_the_end(name, tmp_path, caplog):
    directory = saved(tmp_path / "half", name, outlier=20.0)
    pruner = AutoPruner.from_pretrained(str(directory), device="cpu")
    assert caplog.text.count(LINE) == 1
    made = pruner.prune(0.3, data=TEXT, **SMALL)
    wide = AutoPruner.from_pretrained(str(directory), device="cpu", dtype="float32").prune(0.3, data=TEXT, **SMALL)
    fitness = [each.report.metrics["search_fitness"].value for each in (made, wide)]
    assert 0.5 < fitness[0] / fitness[1] < 2  # of another plan perhaps, and on few tokens
    made.save_pretrained(tmp_path / "out")
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert PrunedModel.from_pretrained(tmp_path / "out", device="cpu").report.parent["dtype"] == "bfloat16"


def test_so_is_one_in_files(checkpoint, tmp_path, caplog):
    pruner = AutoPruner.from_pretrained(str(checkpoint), device="cpu", offload_folder=tmp_path / "scratch")
    made = pruner.prune(0.3, data=TEXT, **SMALL)
    assert made.model.dtype == torch.bfloat16
    assert caplog.text.count(LINE) == 1


def test_so_is_one_whose_configuration_names_no_dtype(checkpoint, caplog):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["dtype"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = AutoPruner.from_pretrained(str(checkpoint), device="cpu").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert caplog.text.count(LINE) == 1


def test_every_bit_is_kept_where_float32_is_asked_for(checkpoint, caplog):
    model = AutoPruner.from_pretrained(str(checkpoint), device="cpu", dtype="float32").model
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), weight.float())
    assert LINE not in caplog.text


def test_what_is_only_measured_stays_as_it_is(checkpoint):
    assert load_model(str(checkpoint), device="cpu")[0].dtype == torch.float16


@pytest.mark.parametrize("asked", ["float16", torch.float16, "torch.float16"])
def test_float16_is_refused_before_anything_is_loaded(asked, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be pruned in float16") as caught:
        AutoPruner.from_pretrained(str(checkpoint), device="cpu", dtype=asked)
    assert "model.to(torch.bfloat16)" in caught.value.hint


def test_so_is_a_model_object():
    with pytest.raises(ModelError, match="cannot be pruned in float16"):
        AutoPruner(tiny_model("llama").half(), tiny_tokenizer(), "tests/llama")
    pruner = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    with pytest.raises(ModelError, match="cannot be pruned in float16"):
        pruner.model = tiny_model("llama").half()
    mixed = tiny_model("llama").half()
    mixed.lm_head.float()
    with pytest.raises(ModelError, match=r"model\.to\(torch\.float32\)"):
        pruner.model = mixed


def test_the_command_line_refuses_it(tmp_path, capsys):
    save_tiny("llama", tmp_path / "dense")
    words = ["prune", str(tmp_path / "dense"), "--beta", "0.3", "--data", "self", "--output", str(tmp_path / "out")]
    assert main([*words, "--dtype", "float16"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be pruned in float16" in said
    assert "--dtype" in said


def test_the_parent_is_measured_in_the_dtype_that_it_was_pruned_in(checkpoint, tmp_path, monkeypatch, capsys):
    """So its weights are compared; in its own dtype, another model of its shape would pass for it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT[0])
    made = AutoPruner.from_pretrained("half", device="cpu").prune(0.3, data=TEXT, repair="none", **SMALL)
    made.save_pretrained("out")
    measure = ["evaluate", "out", "--data", "text.txt", "--window", "32", "--windows", "4", "--device", "cpu", "--save"]
    assert main([*measure, "--against", "half"]) == 0
    assert "half on cpu, bfloat16" in capsys.readouterr().err
    tiny_model("llama", seed=5).half().save_pretrained("other")
    tiny_tokenizer().save_pretrained("other")
    assert main([*measure, "--against", "other"]) == 2
    assert "'other' is not 'half', the parent of this model: other weights" in capsys.readouterr().err
