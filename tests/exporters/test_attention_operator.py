"""The attention that ONNX graphs for CPUs are traced with: what transformers' own gives."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from exporters.to_onnx.attention_operator import OPSET, attending_by_operator, attention_operator
from exporters.tracing import quiet

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


class Owner(torch.nn.Module):
    """Attention with some settings; has what transformers' own wants to know of the module that it is for."""

    head_dim, num_key_value_groups = 16, 3

    def __init__(self, **settings):
        super().__init__()
        self._settings = settings

    def forward(self, *states):
        return attention_operator(self, *states, **self._settings)[0]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("length", [1, 5])
def test_runs_equal_to_transformers(length, scaling, softcap, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, length, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = torch.zeros(2, 1, length, 9)
    mask[1, :, :, :4] = torch.finfo(torch.float32).min
    owner = Owner(scaling=scaling, softcap=softcap).eval()
    wanted, _ = eager_attention_forward(owner, query, key, value, mask, scaling=scaling, softcap=softcap)
    with quiet():
        program = torch.onnx.export(owner, (query, key, value, mask), dynamo=True, opset_version=OPSET)
        program.save(tmp_path / "attention.onnx")
    assert [node.op_type for node in program.model.graph if node.op_type != "Transpose"] == ["Attention"]
    session = onnxruntime.InferenceSession(tmp_path / "attention.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    states = (each.numpy() for each in (query, key, value, mask))
    (found,) = session.run(None, dict(zip(names, states, strict=True)))
    torch.testing.assert_close(torch.from_numpy(found), wanted)


def test_a_model_attends_so_for_a_while():
    model = tiny_model("llama")
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    before = model(IDS, attention_mask=mask).logits
    with attending_by_operator(model):
        torch.testing.assert_close(model(IDS, attention_mask=mask).logits[mask.bool()], before[mask.bool()])
        named = model.config._attn_implementation
    assert named != model.config._attn_implementation
    assert torch.equal(model(IDS, attention_mask=mask).logits, before)
