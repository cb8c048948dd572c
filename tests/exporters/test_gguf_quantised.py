"""GGUF files in K-quants: as llama.cpp chooses and writes the blocks, with rows padded where that is smaller."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, quants
from support.tiny import tiny_model, tiny_pruned
from support.trained import TEXT, VOCABULARY, trained_tokenizer

from exporters.export import export_model
from exporters.to_gguf.dtypes import GGUF_DTYPES, HEAD
from exporters.to_gguf.importance import importance_matrix
from exporters.to_gguf.library import gguf_cross_entropy, quantise
from exporters.to_gguf.llama_cpp import greedy_steps, log_probability_difference
from exporters.to_gguf.writer import write
from selfpruner_hub.errors import ExportError, ModelError, UserError
from selfpruner_hub.evaluation import metrics
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.storage.export_record import read_export

WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "head_dim": 32,
    "attention_bias": False,
}
"""Rows of 256, one block of a K-quant."""
QUANTISED = ("q4_k_m", "q5_k_m", "q6_k", "q4_0")


@pytest.fixture(scope="module", autouse=True)
def runtime():
    pytest.importorskip("xllamacpp")


def gentle(make):
    """A model that is sure of its answers, and whose layers change them little when they are rounded."""
    model = make("llama", **WIDE)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "lm_head" not in name:
            parameter.data *= 0.3
    return model


@pytest.mark.parametrize(("make", "dtype"), [(tiny_model, "q4_k_m"), *((tiny_pruned, dtype) for dtype in QUANTISED)])
def test_log_probabilities_are_near_pytorchs(make, dtype, tmp_path):
    model = gentle(make)
    written = write(model, trained_tokenizer(), tmp_path, dtype=dtype)
    assert 1e-4 < written.compare()() <= written.tolerance
    widths = [w.intermediate_size for w in shape_of(model.config).dense.layers]
    padded = 0
    for tensor in GGUFReader(tmp_path / f"model-{dtype}.gguf").tensors:
        if "ffn_gate" in tensor.name or "ffn_up" in tensor.name:
            own = widths[int(tensor.name.split(".")[1])]
            rows = quants.dequantize(tensor.data, tensor.tensor_type)
            assert len(rows) % 32 == 0
            assert own <= len(rows) < own + 256
            assert not rows[own:].any()  # what ffn_down has for them is multiplied by zero
            padded += len(rows) - own
    assert (padded > 0) == (make is tiny_pruned)


def test_another_model_is_noticed(tmp_path):
    model = gentle(tiny_pruned)
    write(model, trained_tokenizer(), tmp_path, dtype="q4_k_m")
    path, allowed = tmp_path / "model-q4_k_m.gguf", GGUF_DTYPES["q4_k_m"].tolerance
    assert log_probability_difference(greedy_steps(model, 64), path, rounded=True) < allowed
    other = tiny_pruned("llama", seed=1, **WIDE)
    assert log_probability_difference(greedy_steps(other, 64), path, rounded=True) > allowed


def test_the_types_are_those_of_llama_quantize():
    """Read off files that llama-quantize wrote of SmolLM2 (30 layers, hidden size 576) and of a model of size 4096."""
    q4, q6 = GGUF_DTYPES["q4_k_m"], GGUF_DTYPES["q6_k"]
    finer = [layer for layer in range(30) if q4.kind("ffn_down", 1536, layer, 30) == Kind.Q6_K]
    assert finer == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert [layer for layer in range(30) if q4.kind("attn_v", 4096, layer, 30) == Kind.Q6_K] == finer
    assert {q4.kind(name, 4096, 0, 30) for name in ("attn_q", "attn_k", "attn_output", "ffn_up")} == {Kind.Q4_K}
    assert [GGUF_DTYPES[name].kind("attn_qkv", 4096) for name in ("q4_k_m", "q5_k_m", "q6_k", "q4_0")] == [
        Kind.Q5_K, Kind.Q6_K, Kind.Q6_K, Kind.Q4_0,
    ]  # fmt: skip
    assert q4.kind(HEAD, 4096) == Kind.Q6_K
    assert q4.kind("token_embd", 4096) == Kind.Q4_K
    assert [q4.kind(HEAD, 576), q4.kind("ffn_up", 576), q6.kind("ffn_up", 576)] == [Kind.Q8_0, Kind.Q5_0, Kind.Q8_0]
    assert GGUF_DTYPES["q5_k_m"].kind("ffn_up", 576) == Kind.Q5_1
    assert q4.kind("ffn_down", 1507, 3, 30) == Kind.F16
    assert GGUF_DTYPES["f16"].kind("ffn_down", 1507, 3, 30) == Kind.F16


@pytest.mark.parametrize(
    ("width", "stored"),
    [(1024, 1024), (1023, 1024), (970, 1024), (800, 800), (801, 832), (500, 512)],
)
def test_rows_are_padded_where_that_is_smaller(width, stored):
    """Up to 256 where few zeros spare the larger blocks of the fallback, else up to 32."""
    assert GGUF_DTYPES["q4_k_m"].ffn_width(width, 4096, 3, 30) == stored
    assert GGUF_DTYPES["q8_0"].ffn_width(width, 4096, 3, 30) == -(-width // 32) * 32
    assert GGUF_DTYPES["f16"].ffn_width(width, 4096, 3, 30) == width


def test_the_library_writes_what_gguf_writes():
    values = np.random.default_rng(0).standard_normal((130, 256)).astype(np.float32)
    for kind in (Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_0):
        assert quantise(values, kind).tobytes() == quants.quantize(values, kind).tobytes()
    for kind, allowed in ((Kind.Q4_K, 0.08), (Kind.Q5_K, 0.04), (Kind.Q6_K, 0.02)):
        assert (quants.dequantize(quantise(values, kind), kind) - values).std() < allowed


def test_important_columns_are_kept_better():
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 8 == 0, 100.0, 1.0).astype(np.float32)
    error = [
        ((quants.dequantize(quantise(values, Kind.Q4_K, each), Kind.Q4_K) - values) ** 2 * importance).sum()
        for each in (None, importance)
    ]
    assert error[1] < 0.7 * error[0]


def test_an_importance_matrix_is_the_mean_square_of_inputs(tmp_path):
    model = gentle(tiny_pruned)
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 4))
    found = importance_matrix(model, trained_tokenizer(), str(tmp_path / "text.txt"), tokens=256)
    paths = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    assert set(found) == {
        (layer, path) for layer in range(4) for path in (*paths, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    seen = []
    hook = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    again = importance_matrix(model, trained_tokenizer(), str(tmp_path / "text.txt"), tokens=256)[2, "mlp.down_proj"]
    hook.remove()
    expected = torch.cat([each.flatten(0, 1) for each in seen]).square().mean(0)
    torch.testing.assert_close(again, expected.clamp_min(1e-6 * expected.mean().item()))
    assert torch.equal(again, found[2, "mlp.down_proj"])


def test_text_weights_the_errors(tmp_path):
    """The file written with an importance matrix is another, nearer to the model on what the matrix measured."""
    model, text = gentle(tiny_pruned), tmp_path / "text.txt"
    text.write_text("\n".join(TEXT * 60))
    for name, data in (("plain", None), ("weighted", str(text))):
        (tmp_path / name).mkdir()
        written = write(model, trained_tokenizer(), tmp_path / name, dtype="q4_k_m", imatrix=data)
        assert written.options["imatrix"] == data
    weights = model.model.layers[0].mlp.down_proj.weight.detach()
    importance = importance_matrix(model, trained_tokenizer(), str(text))[0, "mlp.down_proj"]
    errors = []
    for name in ("plain", "weighted"):
        tensors = {t.name: t for t in GGUFReader(tmp_path / name / "model-q4_k_m.gguf").tensors}
        tensor = tensors["blk.0.ffn_down.weight"]
        stored = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))[:, : weights.shape[1]]
        errors.append(((stored - weights).square() * importance).sum().item())
    assert errors[1] < 0.95 * errors[0]


def test_the_loss_in_llama_cpp_is_pytorchs(tmp_path):
    model = gentle(tiny_pruned)
    write(model, trained_tokenizer(), tmp_path, dtype="f32")
    windows = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    found = gguf_cross_entropy(tmp_path / "model-f32.gguf", windows, 1)
    assert found == pytest.approx(metrics.cross_entropy(model, windows), abs=1e-3)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="llama.cpp cannot load"):
        gguf_cross_entropy(tmp_path / "broken.gguf", windows, 1)


def test_a_modelfile_for_ollama(tmp_path):
    model, tokenizer = gentle(tiny_pruned), trained_tokenizer()
    model.generation_config.update(temperature=0.2, top_p=0.9, repetition_penalty=1.1, eos_token_id=[1, 2])
    write(model, tokenizer, tmp_path, dtype="q4_0")
    assert (tmp_path / "Modelfile").read_text().splitlines() == [
        "FROM ./model-q4_0.gguf",
        "PARAMETER num_ctx 128",
        "PARAMETER temperature 0.2",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.1",
        'PARAMETER stop "<s>"',
        'PARAMETER stop "</s>"',
    ]


def test_an_export_says_what_fell_back(tmp_path):
    export_model(gentle(tiny_pruned), trained_tokenizer(), "gguf", tmp_path / "wide", dtype="q4_k_m")
    narrow = tiny_pruned("llama", vocab_size=VOCABULARY)
    export_model(narrow, trained_tokenizer(), "gguf", tmp_path / "narrow", dtype="q4_k_m", tolerance=20)
    record = read_export(tmp_path / "narrow", "gguf")
    assert record.options == {"dtype": "q4_k_m", "tokenizer_from": None, "imatrix": None}
    assert "30 of 30 matrices are stored as" in record.remark
    assert "q5_0" in record.remark
    assert "30 of 30" not in read_export(tmp_path / "wide").remark


def test_mistakes(tmp_path, monkeypatch):
    model = gentle(tiny_pruned)
    with pytest.raises(UserError, match="changes nothing in f16.*choose q6_k, q5_k_m, q4_k_m, q4_0"):
        write(model, trained_tokenizer(), tmp_path, imatrix="self")
    with pytest.raises(UserError, match="Cannot read the text"):
        write(model, trained_tokenizer(), tmp_path, dtype="q4_0", imatrix=str(tmp_path / "none.txt"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="llama.cpp's library is not installed"):
        write(model, trained_tokenizer(), tmp_path, dtype="q4_k_m")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_blocks_that_are_wrong(tmp_path, monkeypatch):
    """The rows of every matrix are one off."""
    right = quantise
    monkeypatch.setattr("exporters.to_gguf.writer.quantise", lambda *given: np.roll(right(*given), 1, axis=0))
    with pytest.raises(ExportError, match="differs from the PyTorch model by .* in a log-probability"):
        export_model(gentle(tiny_pruned), trained_tokenizer(), "gguf", tmp_path / "out", dtype="q4_k_m")
    assert not list(tmp_path.iterdir())
