"""TensorRT: engines for GPUs that are not here, what refuses to run where, and steps at fixed addresses."""

from __future__ import annotations

import importlib
import json
import shutil

import onnxruntime
import pytest
import torch
from support.checks import check_cache, check_left_padding
from support.tiny import shallow, tiny_tokenizer

from exporters.export import export_model
from exporters.parity import expected, logit_difference
from exporters.to_onnx.causal_lm import default_options
from exporters.to_tensorrt import causal_lm as tensorrt_causal_lm
from exporters.to_tensorrt import cuda_graphs as fixed_window
from exporters.to_tensorrt import library as tensorrt_library
from exporters.to_tensorrt import writer as to_tensorrt
from exporters.to_tensorrt.causal_lm import TensorRtCausalLM
from exporters.to_tensorrt.cuda_graphs import layer_names
from exporters.to_tensorrt.profiles import profiles
from selfpruner_hub.errors import ExportError, MissingExtraError, SavedModelError, UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.storage.export_record import read_export

pytestmark = pytest.mark.heavy
rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason='not installed: pip install "selfpruner-hub[tensorrt-rtx]"'
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="an NVIDIA GPU is here")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A function: the plain graph of a tiny pruned model in a dtype, traced once."""
    made = {}

    def get(name, dtype):
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp("graph") / "model.onnx"
            to_tensorrt.save_plain_graph(shallow(name), dtype, made[name, dtype])
        return made[name, dtype]

    return get


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model's engine for an RTX 3090."""
    model = shallow("llama")
    options = {"compute_capability": "8.6", "batch": 2, "context": 64}
    return export_model(model, tiny_tokenizer(), "tensorrt", tmp_path_factory.mktemp("trt") / "out", **options)


@rtx
@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpu", "dtype"), [("gemma3", "8.9", "bfloat16"), ("phi3", "8.0", "float32")])
def test_engines_are_built_without_a_gpu(name, gpu, dtype, traced):
    """Norms of heads and outputs, sliding windows; fused projections. `exported` is the third engine, in float16."""
    library = tensorrt_library.find_library("tensorrt_rtx")
    graph = traced(name, getattr(torch, dtype))
    engine = to_tensorrt.build_engine(library, graph, shallow(name).config, profiles(2, 64), gpu)
    assert len(engine) > 10_000


@rtx
@pytest.mark.slow
def test_an_export_for_another_gpu(exported):
    record = read_export(exported, "tensorrt")
    assert record.options["compute_capability"] == "8.6"
    assert record.options["gpu"] is None
    assert [profile["name"] for profile in record.options["profiles"]] == ["prefill", "decode"]
    assert record.max_difference is None
    assert record.unchecked == "the engine was not run: no GPU of compute capability 8.6 is here"
    assert "tensorrt_rtx_cu13" in record.versions
    names = {path.name for path in exported.iterdir()}
    assert {"model.engine", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if "onnx" in name]


@rtx
@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_damaged_engine(damage, exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "out")
    engine = directory / "model.engine"
    if damage == "cut":
        engine.write_bytes(engine.read_bytes()[:-100])
    elif damage == "other":
        engine.write_bytes(b"ftrt" + bytes(1000))
    else:
        engine.unlink()
    said = "cannot be read: No such file" if damage == "gone" else "not the engine that its record tells of"
    with pytest.raises(SavedModelError, match=said):
        TensorRtCausalLM.from_pretrained(directory)


@rtx
@pytest.mark.slow
def test_an_engine_for_another_gpu(exported, monkeypatch):
    monkeypatch.setattr(tensorrt_causal_lm, "gpu_here", lambda: ("9.0", "NVIDIA H100"))
    said = r"for compute capability 8\.6; this GPU \(NVIDIA H100\) has 9\.0\..*--compute-capability 9\.0"
    with pytest.raises(SavedModelError, match=said):
        TensorRtCausalLM.from_pretrained(exported)


@rtx
@pytest.mark.slow
def test_an_engine_of_another_version(exported, monkeypatch, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "out")
    record = json.loads((directory / "selfpruner_export.json").read_text())
    record["versions"]["tensorrt_rtx_cu13"] = "1.0.0"
    (directory / "selfpruner_export.json").write_text(json.dumps(record))
    monkeypatch.setattr(tensorrt_causal_lm, "gpu_here", lambda: ("8.6", "NVIDIA GeForce RTX 3090"))
    with pytest.raises(SavedModelError, match=r"built by tensorrt_rtx 1\.0\.0; .* is installed"):
        TensorRtCausalLM.from_pretrained(directory)


@rtx
@no_gpu
@pytest.mark.slow
def test_an_engine_without_a_gpu(exported):
    with pytest.raises(UserError, match=r"sees no NVIDIA GPU here; the engine is for compute capability 8\.6"):
        TensorRtCausalLM.from_pretrained(exported)


@no_gpu
def test_no_gpu_and_none_named(tmp_path):
    with pytest.raises(UserError, match=r"sees no NVIDIA GPU here to build.*--compute-capability 8\.6"):
        export_model(shallow("llama"), None, "tensorrt", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_the_library(monkeypatch, tmp_path):
    import_module = importlib.import_module

    def refuse(name, *args):
        if name.startswith("tensorrt"):
            raise ImportError(name)
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(MissingExtraError, match=r'TensorRT is not installed.*"selfpruner-hub\[tensorrt-rtx\]"'):
        export_model(shallow("llama"), None, "tensorrt", tmp_path / "out", compute_capability="8.6")
    assert not list(tmp_path.iterdir())


@rtx
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compute_capability": "5.2"}, "Unknown compute capability '5.2'.*7.5, 8.0, 8.6, 8.9"),
        ({"compute_capability": "fast"}, "'fast' is no compute capability"),
        ({"compute_capability": "8.6", "dtype": "int8"}, "Unknown dtype 'int8'.*float32, float16, bfloat16"),
        ({"compute_capability": "8.6", "batch": 0}, "batch must be a whole number of at least 1; got 0"),
        ({"compute_capability": "8.6", "context": 1}, "context must be a whole number of at least 2; got 1"),
    ],
)
def test_mistakes(options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        export_model(shallow("llama"), None, "tensorrt", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@rtx
@pytest.mark.slow
def test_nothing_is_left_of_an_engine_that_cannot_be_built(tmp_path, monkeypatch):
    def spoil(model, dtype, path):
        path.write_text("This is no graph.")

    monkeypatch.setattr(to_tensorrt, "save_plain_graph", spoil)
    with pytest.raises(ExportError, match="TensorRT cannot (read the graph|build the engine)") as raised:
        export_model(shallow("llama"), None, "tensorrt", tmp_path / "out", compute_capability="8.9")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", ["8.6", "SM86", "sm_86", 8.6, "86"])
def test_ways_to_write_a_compute_capability(written):
    assert tensorrt_library.parse_capability(written) == "8.6"


def test_profiles():
    prefill, decode = profiles(4, 128)
    shape = shape_of(shallow("llama").config)
    widths = [layer.num_key_value_heads for layer in shape.dense.layers]
    assert prefill.input_shapes(shape)["input_ids"] == ((1, 1), (4, 64), (4, 128))
    assert decode.input_shapes(shape)["input_ids"] == ((1, 1), (4, 1), (4, 1))
    assert decode.input_shapes(shape)["attention_mask"] == ((1, 1), (4, 65), (4, 128))
    for index, width in enumerate(widths):
        smallest, _, largest = decode.input_shapes(shape)[f"input.cache.layers.{index}.keys"]
        assert (smallest, largest) == ((1, width, 0, 4), (4, width, 127, 4))


class OnnxEngine:
    """An `Engine` without a GPU: runs the same graph in ONNX Runtime, and notes what it was asked to run."""

    device = "cpu"

    def __init__(self, path, context):
        self.session = onnxruntime.InferenceSession(path, default_options(), providers=["CPUExecutionProvider"])
        self.limits, self.runs = profiles(4, context), []

    def capturable(self, profile):
        return False

    def run(self, profile, inputs, outputs=None):
        past, length = inputs["input.cache.layers.0.keys"].shape[2], inputs["input_ids"].shape[1]
        limits = self.limits[profile]
        assert limits.length[0] <= length <= limits.length[2]
        assert limits.past[0] <= past <= limits.past[2]
        assert inputs["attention_mask"].shape[1] == past + length
        self.runs.append((profile, past))
        names = [output.name for output in self.session.get_outputs()]
        found = self.session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        made = {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}
        if outputs is None:
            return made
        for name, tensor in outputs.items():
            tensor.copy_(made[name])
        return outputs


@pytest.mark.slow
def test_steps_in_a_window_of_fixed_size(traced, monkeypatch):
    """Masks, windows that grow, a cache that goes its own way, and the end of the context, as on a GPU."""
    name = "mistral"  # its attention has a window too
    monkeypatch.setattr(fixed_window, "WINDOW_STEP", 8)
    model, engine = shallow(name), OnnxEngine(traced(name, torch.float32), 64)
    exported = TensorRtCausalLM(engine, model.config, 64, torch.float32, model.generation_config)
    assert logit_difference(expected(model, prompts=(20, 7, 1), steps=30), exported) <= 1e-4
    windows = [past for profile, past in engine.runs if profile == 1]
    assert set(windows) == {24, 32, 40, 48, 56}
    assert len(windows) == 30 + 5  # with a first run of each window
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    check_cache(exported, ids)
    check_left_padding(exported, ids, pad=0)
    beams = [m.generate(ids, num_beams=3, do_sample=False, max_new_tokens=12).tolist() for m in (exported, model)]
    assert beams[0] == beams[1]
    full = exported.generate(ids, max_new_tokens=53, min_new_tokens=53, do_sample=False)
    assert full.tolist() == model.generate(ids, max_new_tokens=53, min_new_tokens=53, do_sample=False).tolist()
    with pytest.raises(UserError, match="65 tokens are more than the 64 that this engine takes"):
        exported(torch.ones(1, 65, dtype=torch.long))


def test_names_of_the_cache():
    assert layer_names("output", 2)[1:3] == ["output.cache.layers.0.values", "output.cache.layers.1.keys"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_on_a_gpu(dtype, tmp_path):
    """Built, compared, captured as CUDA graphs, and the same text."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    model = shallow("llama")
    export_model(model, tiny_tokenizer(), "tensorrt", tmp_path / "out", dtype=dtype, batch=3, context=512)
    record = read_export(tmp_path / "out", "tensorrt")
    assert record.max_difference <= record.tolerance
    assert record.options["gpu"] == torch.cuda.get_device_name()
    ids = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(0))
    texts = []
    for graphs in (True, False):
        exported = TensorRtCausalLM.from_pretrained(tmp_path / "out", graphs=graphs)
        texts.append(exported.generate(ids.cuda(), max_new_tokens=300, do_sample=False).tolist())
    assert texts[0] == texts[1]
    if dtype == "float32":
        assert texts[0][0][:60] == model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
