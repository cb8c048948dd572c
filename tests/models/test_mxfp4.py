"""Files of gpt-oss hold MXFP4: they are dequantised as they are loaded, cut, and saved in the dtype of the run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mixtures import tiny_mixture
from support.tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, Mxfp4Config

from selfpruner_hub.errors import UnsupportedArchitectureError
from selfpruner_hub.pruner import AutoPruner

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Values of the sixteen codes of E2M1 (OCP Microscaling Formats, 5.3.3)."""
QUICK = {"data": "self", "window": 32, "calibration_tokens": 256, "fitness_tokens": 64, "fisher_tokens": 64}


@pytest.fixture
def packed(tmp_path):
    """A tiny gpt-oss whose experts are stored in MXFP4, and the values that they stand for."""
    model = tiny_mixture("gpt_oss", intermediate_size=32)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tensors, values = load_file(tmp_path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape  # the file has a row of blocks of 32 inputs for each output
        codes = torch.randint(16, (count, outputs, inputs // 32, 16, 2), generator=generator)
        scales = torch.randint(120, 124, (count, outputs, inputs // 32), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., 0] + 16 * codes[..., 1]).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
        whole = FP4[codes.flatten(-2)] * 2.0 ** (scales[..., None] - 127)
        values[name] = whole.flatten(-2).transpose(1, 2)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, values


def test_mxfp4_is_dequantised_and_cut(packed, tmp_path):
    directory, values = packed
    with pytest.raises(UnsupportedArchitectureError, match="are quantised"):
        AutoPruner.from_pretrained(str(directory))
    pruner = AutoPruner.from_pretrained(str(directory), quantization_config=Mxfp4Config(dequantize=True))
    tensors = dict(pruner.model.named_parameters())
    assert len(values) == 6
    for name, value in values.items():
        assert torch.equal(tensors[name].float(), value), name
    pruned = pruner.prune(0.25, progress=False, **QUICK)
    pruned.save_pretrained(tmp_path / "pruned")
    assert "quantization_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto", trust_remote_code=True)
    ids = torch.arange(3, 23)[None]
    assert torch.equal(again.eval()(ids).logits, pruned.model(ids).logits)
