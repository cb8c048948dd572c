"""Models that cannot be pruned: one line says why, from the configuration alone."""

from __future__ import annotations

import json

import pytest
from support.tiny import CONFIGS, tiny_model
from transformers import CONFIG_MAPPING, BitsAndBytesConfig, FineGrainedFP8Config

from selfpruner_hub.cli.main import main
from selfpruner_hub.errors import UnsupportedArchitectureError
from selfpruner_hub.models.architectures import architecture_of
from selfpruner_hub.models.unsupported import refuse_quantized
from selfpruner_hub.pruner import AutoPruner

EXPERTS = "they are mixtures of experts"
OTHERS = "some of their layers have no attention"
REASONS = {
    **dict.fromkeys(("hunyuan_v1_moe", "minimax_m2", "phimoe"), EXPERTS),
    **dict.fromkeys(("jamba", "falcon_h1", "bamba", "lfm2", "zamba2", "nemotron_h", "granitemoehybrid"), OTHERS),
    **dict.fromkeys(("mamba", "mamba2", "recurrent_gemma", "qwen3_next"), OTHERS),
    **dict.fromkeys(("t5", "bart"), "they are encoder-decoders"),
    "llava": "they wrap a text model of type 'llama'",
}
METHODS = ("bitsandbytes", "gptq", "awq", "fp8", "torchao", "compressed-tensors", "mxfp4", "hqq")


@pytest.mark.parametrize("model_type", REASONS)
def test_the_reason_names_the_kind(model_type):
    with pytest.raises(UnsupportedArchitectureError) as caught:
        architecture_of(CONFIG_MAPPING[model_type]())
    assert caught.value.message == f"Models of type {model_type!r} are not supported: {REASONS[model_type]}."


@pytest.mark.parametrize("model_type", ["gpt2", "nemotron", "stablelm"])
def test_a_type_that_only_lacks_a_row(model_type):
    with pytest.raises(UnsupportedArchitectureError) as caught:
        architecture_of(CONFIG_MAPPING[model_type]())
    assert caught.value.message == f"Models of type {model_type!r} are not supported."


@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_are_refused_before_they_are_read(method, tmp_path):
    """There are none here to read."""
    quantised_config(tmp_path, method)
    with pytest.raises(UnsupportedArchitectureError, match=rf"quantised \({method}\)") as caught:
        AutoPruner.from_pretrained(str(tmp_path))
    assert "bfloat16" in caught.value.hint


def quantised_config(directory, method):
    values = {**CONFIGS["llama"].to_dict(), "quantization_config": {"quant_method": method}}
    (directory / "config.json").write_text(json.dumps(values))


def test_from_the_command_line(tmp_path, capsys):
    quantised_config(tmp_path, "awq")
    (tmp_path / "phimoe").mkdir()
    CONFIG_MAPPING["phimoe"]().save_pretrained(tmp_path / "phimoe")
    for name, words in ((tmp_path, "quantised (awq)"), (tmp_path / "phimoe", EXPERTS)):
        assert main(["prune", str(name), "--beta", "0.3", "--output", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1


def test_quantization_that_is_asked_for():
    config = CONFIGS["llama"]
    with pytest.raises(UnsupportedArchitectureError, match="bitsandbytes"):
        refuse_quantized(config, "model", BitsAndBytesConfig(load_in_8bit=True))
    refuse_quantized(config, "model", FineGrainedFP8Config(dequantize=True))
    refuse_quantized(config, "model")


def test_a_quantised_model_in_memory():
    model = tiny_model("llama")
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(UnsupportedArchitectureError, match="quantised"):
        AutoPruner(model, None, "tests/llama")
