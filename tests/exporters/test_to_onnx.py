"""ONNX: one graph for prefill and steps, checked against PyTorch, that writes text by `generate()`."""

from __future__ import annotations

import copy
import importlib.util
import math
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from support.checks import check_cache, check_left_padding, logits
from support.processes import run_python
from support.tiny import shallow, tiny_model, tiny_tokenizer

from exporters import OnnxCausalLM
from exporters.export import export_model
from exporters.parity import expected, logit_difference
from exporters.to_onnx import writer as to_onnx
from exporters.to_tensorrt import writer as to_tensorrt
from selfpruner_hub.errors import ExportError, MissingExtraError, SavedModelError, UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.storage.export_record import read_export

pytestmark = pytest.mark.heavy

IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
ATTENDING = ("llama", "mistral", "gemma2", "gemma3", "phi3", "cohere2", "olmo2")
"""Models whose attention or cache differs; the rest of a graph is transformers' own layers."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: the directory of a tiny pruned model's export, made when it is asked for the first time."""
    root, made = tmp_path_factory.mktemp("onnx"), {}

    def get(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = export_model(shallow(name), tiny_tokenizer(), "onnx", root / str(len(made)), **options)
        return made[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENDING)
def test_every_kind_of_attention(name, exported):
    """Sliding windows (16) are shorter than the prompts: what the graph's mask does is compared too."""
    directory = exported(name)
    record = read_export(directory, "onnx")
    assert record.max_difference <= 1e-4
    assert record.source["parameters"] == sum(p.numel() for p in shallow(name).parameters())
    model, graph = shallow(name), OnnxCausalLM.from_pretrained(directory)
    assert logit_difference(expected(model, prompts=(30, 30), steps=12), graph) <= 1e-4
    check_left_padding(graph, IDS[:, :30], pad=0)
    check_cache(graph, IDS[:, :10])
    ours, theirs = (m.generate(IDS[:, :20], max_new_tokens=16, do_sample=False) for m in (graph, model))
    assert ours.tolist() == theirs.tolist()


def test_no_key_or_value_is_copied_for_the_query_heads_that_share_it(exported):
    graph = onnx.load(exported("llama") / "model.onnx", load_external_data=False).graph
    readers = {node.op_type for node in graph.node for name in node.input if name.startswith("output.cache.")}
    assert readers - {"Shape"} == {"Attention"}


def test_layers_have_caches_of_their_own_width(exported):
    graph = onnx.load(exported("llama") / "model.onnx", load_external_data=False).graph
    keys = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    for index, layer in enumerate(shape_of(shallow("llama").config).dense.layers):
        assert keys[f"input.cache.layers.{index}.keys"] == ["batch", layer.num_key_value_heads, "past", 4]
    assert keys["input_ids"] == keys["position_ids"] == ["batch", "length"]
    assert keys["attention_mask"] == ["batch", "total"]
    assert [d.dim_param or d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == ["batch", "kept", 128]


def test_weights_are_on_disk_once(exported):
    """Of a tied head that is larger than this one's, too: `test_real_exports.py`."""
    graph = onnx.load(exported("llama") / "model.onnx", load_external_data=False).graph
    stored = sum(math.prod(tensor.dims) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    parameters = sum(p.numel() for p in shallow("llama").parameters())
    assert 0.99 * parameters < stored < 1.01 * parameters  # zeros of equal size are stored once; there are constants


def test_only_the_logits_that_are_wanted(exported):
    graph, model = OnnxCausalLM.from_pretrained(exported("llama")), shallow("llama")
    whole = logits(model, IDS)
    torch.testing.assert_close(logits(graph, IDS, logits_to_keep=1), whole[:, -1:], atol=1e-4, rtol=0)
    wanted = torch.tensor([3, 0, 39])
    torch.testing.assert_close(logits(graph, IDS, logits_to_keep=wanted), whole[:, wanted], atol=1e-4, rtol=0)
    assert graph(IDS, use_cache=False).cache is None


def test_a_conversation_goes_on_from_its_cache(exported):
    """Several new tokens after a past, and a batch of more than one of them."""
    graph, whole = OnnxCausalLM.from_pretrained(exported("llama")), logits(shallow("llama"), IDS)
    first = graph(IDS[:, :15])
    assert [layer.keys.shape[2] for layer in first.cache.layers] == [15] * 2
    second = graph(IDS[:, 15:], cache=first.cache)
    assert second.cache is first.cache
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "top_k": 8}, {"use_cache": False}])
def test_other_ways_to_generate(how, exported):
    written = []
    for model in (OnnxCausalLM.from_pretrained(exported("gemma3")), shallow("gemma3")):
        torch.manual_seed(0)
        written.append(model.generate(IDS[:, :12], **{"do_sample": False, "max_new_tokens": 12, **how}).tolist())
    assert written[0] == written[1]


@pytest.mark.slow
def test_a_plain_graph(exported):
    directory = exported("llama-mha-tied", fusions="none")
    record = read_export(directory)
    assert record.options == {"dtype": "float32", "fusions": "none", "layout": "transformers"}
    assert record.max_difference <= 1e-4
    graphs = [onnx.load(path / "model.onnx").graph for path in (directory, exported("gemma2"))]
    assert ["com.microsoft" in {node.domain for node in graph.node} for graph in graphs] == [False, True]
    check_cache(OnnxCausalLM.from_pretrained(directory), IDS[:, :10], new_tokens=4)


def test_files_of_an_export(exported):
    names = {path.name for path in exported("llama").iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert {"selfpruner_export.json", "export.json"} <= names


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replaced(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("model.onnx", cut, "damaged or cut off"),
        ("model.onnx", Path.unlink, "damaged or cut off"),
        ("model.onnx", lambda path: path.write_text("This is no graph."), "damaged or cut off"),
        ("model.onnx.data", cut, "damaged or cut off"),
        ("model.onnx.data", Path.unlink, "damaged or cut off"),
        ("config.json", Path.unlink, "no config.json"),
        ("export.json", Path.unlink, "damaged or cut off"),
        ("selfpruner_export.json", cut, "damaged"),
        ("selfpruner_export.json", Path.unlink, "holds no export"),
        ("selfpruner_export.json", replaced('"onnx"', '"gguf"'), "an export to gguf, not to onnx"),
        ("selfpruner_export.json", replaced('"schema_version": 1', '"schema_version": 99'), "schema version 99"),
    ],
)
def test_damaged_and_foreign_exports(file, damage, said, exported, tmp_path):
    directory = shutil.copytree(exported("llama"), tmp_path / "out")
    damage(directory / file)
    with pytest.raises(SavedModelError) as raised:
        OnnxCausalLM.from_pretrained(directory)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_directory_that_holds_no_export(tmp_path):
    with pytest.raises(SavedModelError, match="holds no export.*selfpruner export"):
        OnnxCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider", "NoSuchProvider"])
def test_a_provider_that_is_not_there(provider, exported):
    """Never a silent fall-back to the CPU."""
    import onnxruntime

    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {provider}")
    with pytest.raises(UserError, match=f"cannot run on {provider} here.*onnx-gpu"):
        OnnxCausalLM.from_pretrained(exported("llama"), providers=[provider, "CPUExecutionProvider"])


def test_without_onnxruntime(exported, monkeypatch, tmp_path):
    directory, find = exported("llama"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    with pytest.raises(MissingExtraError, match=r'pip install "selfpruner-hub\[onnx\]"'):
        OnnxCausalLM.from_pretrained(directory)
    with pytest.raises(MissingExtraError, match=r'pip install "selfpruner-hub\[onnx\]"'):
        export_model(shallow("llama"), None, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unknown_options(tmp_path):
    for options, said in (
        ({"dtype": "int3"}, "Unknown dtype 'int3'.*float32, float16, int8"),
        ({"fusions": "tpu"}, "Unknown fusions 'tpu'.*cuda, cpu, none"),
        ({"depth": 3}, "no option 'depth'.*It takes dtype, fusions"),
    ):
        with pytest.raises(UserError, match=said):
            export_model(shallow("llama"), None, "onnx", tmp_path / "out", **options)
    with pytest.raises(UserError, match="Unknown format 'onyx'.*onnx, tensorrt, openvino, gguf"):
        export_model(shallow("llama"), None, "onyx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nothing_is_left_of_a_graph_that_differs(tmp_path, monkeypatch):
    trace = to_onnx.trace

    def spoilt(model, *args):
        model = copy.deepcopy(model)
        model.lm_head.weight.data[7] *= 1.5
        return trace(model, *args)

    monkeypatch.setattr(to_onnx, "trace", spoilt)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("stays")
    with pytest.raises(ExportError, match="The onnx export differs from the PyTorch model by .* in a logit"):
        export_model(tiny_model("phi3", num_hidden_layers=1), tiny_tokenizer(), "onnx", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_nothing_is_left_of_a_model_that_cannot_be_traced(tmp_path, monkeypatch):
    model = shallow("llama")
    monkeypatch.setattr(model, "forward", lambda **inputs: inputs["input_ids"].sum().item() + 1 / 0)
    with pytest.raises(ExportError, match="SelfPrunedLlamaForCausalLM cannot be traced to ONNX") as raised:
        export_model(model, None, "onnx", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_class_is_imported_without_the_libraries():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('onnx', 'onnxscript', 'onnxruntime')))\n"
        "from exporters import OnnxCausalLM"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_graphs_have_the_rotary_frequencies_of_the_model(dtype, tmp_path, monkeypatch):
    """Rounded ones are out of phase at long distances, which no comparison of short texts shows."""
    traced = []

    def keep(model, *_args, **_options):
        traced.append(model)
        raise ExportError("Enough.", "")

    model = shallow("llama")
    for module in (to_onnx, to_tensorrt):
        monkeypatch.setattr(module, "trace", keep)
    with pytest.raises(ExportError, match="Enough"):
        to_tensorrt.save_plain_graph(model, getattr(torch, dtype), tmp_path / "graph.onnx")
    if dtype == "float16":
        with pytest.raises(ExportError, match="Enough"):
            export_model(model, None, "onnx", tmp_path / "out", dtype=dtype)
    for each in traced:
        assert str(each.dtype) == f"torch.{dtype}"
        assert torch.equal(each.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_a_tolerance_is_a_distance(tolerance, tmp_path):
    with pytest.raises(UserError, match="tolerance must be a number of at least 0"):
        export_model(shallow("llama"), None, "onnx", tmp_path / "out", tolerance=tolerance)
