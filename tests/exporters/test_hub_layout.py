"""ONNX under the names of the Hub: the real ONNX Runtime GenAI and Transformers.js write PyTorch's text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import onnx
import pytest
import torch
from support.chatting import chat_tokenizer
from support.javascript import transformers_js
from support.processes import run_python
from support.shortened import shortened
from support.trained import VOCABULARY, trained_tokenizer

from exporters import OnnxCausalLM
from exporters.benchmark import Passes, benchmark
from exporters.benchmark.worker import started
from exporters.benchmark.workload import workload_of
from exporters.export import export_model
from exporters.format import FORMATS
from exporters.parity import expected, logit_difference
from exporters.runtime import Setting
from exporters.to_onnx import hub_layout
from exporters.to_onnx.causal_lm import default_options
from exporters.to_onnx.matrix_bits import rounded
from exporters.to_onnx.writer import ONNX_TOLERANCES, expected_by_dtype
from selfpruner_hub.errors import ExportError, SavedModelError, UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, read_export

pytestmark = pytest.mark.heavy

PROMPTS = ("The quick brown fox", "In 1984 they", "def quick(fox):")
NEW = 16
GENAI = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
for ids in json.loads(sys.argv[2]):
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + int(sys.argv[3]))
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    print(json.dumps([int(index) for index in generator.get_sequence(0)]))
"""
TRANSFORMERS_JS = """
import { AutoModelForCausalLM, AutoTokenizer, env } from '@huggingface/transformers';
const [folder, name, dtype, prompts, count] = process.argv.slice(1);
env.allowRemoteModels = false;
env.localModelPath = folder;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype, device: 'cpu' });
for (const prompt of JSON.parse(prompts)) {
  const out = await model.generate({ ...tokenizer(prompt), max_new_tokens: Number(count), do_sample: false });
  console.log(JSON.stringify(out.tolist()[0].map(Number)));
}
"""

CHAT = """
import { AutoTokenizer, env } from '@huggingface/transformers';
const [folder, messages] = process.argv.slice(1);
env.allowRemoteModels = false;
env.localModelPath = folder;
const tokenizer = await AutoTokenizer.from_pretrained('model');
const options = { add_generation_prompt: true, tokenize: false };
console.log(JSON.stringify(tokenizer.apply_chat_template(JSON.parse(messages), options)));
"""


@pytest.fixture(scope="module")
def model(saved_graphs):
    """A pruned model whose layers have caches of different widths."""
    return PrunedModel.from_pretrained(saved_graphs / "model", dtype=torch.float32).model


@pytest.fixture(scope="module")
def directory(saved_graphs, tmp_path_factory):
    """Its graphs, for tests that write beside them."""
    return shutil.copytree(saved_graphs / "model" / "onnx", tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="module")
def written(model):
    return in_pytorch(model, trained_tokenizer())


def in_pytorch(model, tokenizer):
    """The ids of the prompts, and PyTorch's greedy text after each."""
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    told = [model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0].tolist() for ids in prompts]
    return prompts, told


def test_transformers_loads_the_tokenizer_without_the_package(directory):
    """Its configuration has a stock class, which reads one number of heads where layers have their own."""
    code = "from transformers import AutoTokenizer as A; print(A.from_pretrained(sys.argv[1])(sys.argv[2]))"
    done = run_python(f"import sys; sys.modules['selfpruner_hub'] = None; {code}", directory, PROMPTS[0])
    assert done.returncode == 0, done.stderr[-500:]
    assert str(trained_tokenizer()(PROMPTS[0])["input_ids"]) in done.stdout


def test_names_are_those_of_the_hub(model, directory):
    for dtype, element in (("float32", onnx.TensorProto.FLOAT), ("float16", onnx.TensorProto.FLOAT16)):
        graph = onnx.load(directory / hub_layout.file_of(dtype), load_external_data=False).graph
        shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
        assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
        assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
        widths = shape_of(model.config).dense.layers
        assert len({layer.num_key_value_heads for layer in widths}) > 1
        for index, layer in enumerate(widths):
            for what in ("key", "value"):
                past = ["batch_size", layer.num_key_value_heads, "past_sequence_length", 4]
                assert shapes.pop(f"past_key_values.{index}.{what}") == past
        assert set(shapes) == {"input_ids", "attention_mask", "position_ids"}
        outputs = {v.name: v for v in graph.output}
        logits = outputs.pop("logits").type.tensor_type
        assert [d.dim_param or d.dim_value for d in logits.shape.dim] == ["batch_size", 1, VOCABULARY]
        assert set(outputs) == {f"present.{i}.{what}" for i in range(len(widths)) for what in ("key", "value")}
        assert outputs["present.0.key"].type.tensor_type.elem_type == element


def test_files_and_configurations(model, directory):
    names = {"model.onnx", "model_fp16.onnx", "model_q4.onnx", "model_quantized.onnx"}
    assert {path.name for path in (directory / "onnx").iterdir()} == names | {f"{name}_data" for name in names}
    config = json.loads((directory / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config
    assert set(config["transformers.js_config"]["use_external_data_format"]) == names
    genai = json.loads((directory / "genai_config.json").read_text())
    assert genai["model"]["type"] == "llama"
    assert genai["search"]["past_present_share_buffer"] is False
    record = read_export(directory, "onnx")
    assert record.options["layout"] == "hub"
    assert record.max_difference <= 1e-4
    sizes = [(directory / f"onnx/{name}_data").stat().st_size for name in sorted(names)]
    assert sizes[0] > sizes[1]  # float16
    assert sizes[3] > sizes[2]  # 8 bits, 4 bits


def test_onnx_runtime_writes_pytorchs_text(model, directory, written):
    graph = hub_layout.HubGraph(directory / "onnx/model.onnx", model.config, None)
    for ids, told in zip(*written, strict=True):
        assert graph.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0].tolist() == told


def check_genai(directory, written):
    """In a process of its own: the library is C++."""
    pytest.importorskip("onnxruntime_genai", reason="needs pip install onnxruntime-genai")
    done = run_python(GENAI, directory, json.dumps(written[0]), NEW)
    assert done.returncode == 0, done.stderr[-500:]
    # GenAI leaves an end-of-text token out of the sequence.
    for line, told in zip(done.stdout.splitlines(), written[1], strict=True):
        assert json.loads(line) == told[: len(json.loads(line))]
        assert len(told) - len(json.loads(line)) <= 1


def test_transformers_js_has_the_chat_template(model, tmp_path):
    """It does not read `chat_template.jinja`: without a template, a chat model would be asked in the wrong form."""
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    hub_layout.save_configurations(model, tmp_path / "model")
    messages = [{"role": "user", "content": "abc"}]
    done = subprocess.run(
        ["node", "--input-type=module", "-e", CHAT, tmp_path, json.dumps(messages)],
        cwd=transformers_js(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert json.loads(done.stdout) == wanted


def test_genai_writes_pytorchs_text(directory, written):
    check_genai(directory, written)


@pytest.mark.parametrize("dtype", ["float32", "int4"])
@pytest.mark.usefixtures("forked_workers")
def test_genai_is_timed(dtype, directory):
    """Two prompts at a time, and an end-of-text token does not stop it."""
    pytest.importorskip("onnxruntime_genai", reason="needs pip install onnxruntime-genai")
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    with started("genai", str(directory), Setting(threads=1, device="cpu", dtype=dtype, longest=64)) as worker:
        for count in (1, 40):
            measured = worker.measure(ids, count)
            assert 0 < measured.decode < 1000
            assert 0 < measured.prefill < 10_000
        with pytest.raises(UserError, match="genai is timed here, not scored on text"):
            worker.cross_entropy(ids)


@pytest.mark.usefixtures("forked_workers")
def test_genai_is_compared_by_the_widths_of_every_layer(model, saved_graphs, directory, tmp_path):
    """The export of the dense parent beside it, as `benchmarks/serving.py` has them."""
    pytest.importorskip("onnxruntime_genai", reason="needs pip install onnxruntime-genai")
    dense, _ = load_model(str(saved_graphs / "dense"), device="cpu", dtype=torch.float32)
    parent, graphs = tmp_path / "dense", directory / "dense"
    shutil.copytree(graphs, parent / "onnx")  # without the one in float32
    hub_layout.save_configurations(dense, parent)
    shutil.copy(graphs / EXPORT_RECORD_FILE, parent)
    found = benchmark(directory, parent, "genai", Passes(prompts=(8,), new_tokens=2, runs=2, dtype="int8", threads=1))
    works = [workload_of(each.config) for each in (dense, model)]
    assert [found.dense.workload, found.pruned.workload] == works
    assert found.cases[0].prefill.ideal > 1


def test_genai_reads_this_layout_alone(directory, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_genai", reason="needs pip install onnxruntime-genai")
    setting = Setting(threads=1, device="cpu", dtype="float32", longest=64)
    text = (directory / EXPORT_RECORD_FILE).read_text()
    (tmp_path / EXPORT_RECORD_FILE).write_text(text.replace('"layout": "hub"', '"layout": "transformers"'))
    with pytest.raises(SavedModelError, match="is not for GenAI. Export the model with --layout hub"):
        FORMATS["genai"].load(str(tmp_path), setting)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(UserError, match="pip install onnxruntime-genai"):
        FORMATS["genai"].load(str(directory), setting)


def in_transformers_js(dtype, directory):
    """The token ids that it writes after each prompt, prompts included."""
    words = [directory.parent, directory.name, dtype, json.dumps(PROMPTS), str(NEW)]
    done = subprocess.run(
        ["node", "--input-type=module", "-e", TRANSFORMERS_JS, *words],
        cwd=transformers_js(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "q8", "q4"])
def test_transformers_js_writes_pytorchs_text(dtype, directory, written):
    lines = in_transformers_js(dtype, directory)
    if dtype in ("fp32", "fp16"):
        assert lines == written[1]
    for line, ids in zip(lines, written[0], strict=True):  # rounded weights of a random model: another text
        assert line[: len(ids)] == ids
        assert len(line) > len(ids)


def test_mistakes(model, directory, tmp_path, monkeypatch):
    with pytest.raises(SavedModelError, match="layout hub"):
        OnnxCausalLM.from_pretrained(directory)
    for options, says in (
        ({"layout": "web"}, "Unknown layout 'web'. Choose transformers, hub"),
        ({"layout": "hub", "dtype": "int8"}, "a graph in every dtype"),
        ({"layout": "hub", "fusions": "cuda"}, "a graph in every dtype"),
    ):
        with pytest.raises(UserError, match=says):
            export_model(model, trained_tokenizer(), "onnx", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def compared(model, directory, **tolerances):
    passes, _ = expected_by_dtype(model)
    return hub_layout.graphs_difference(
        passes, directory, model.config, {**ONNX_TOLERANCES, **tolerances}, default_options()
    )


def test_every_graph_is_compared(model, directory):
    """A 4-bit graph that is further from PyTorch than its tolerance is named."""
    assert compared(model, directory) <= 1e-4
    with pytest.raises(ExportError, match=r"onnx/model_q4\.onnx differs from .* in a KL divergence"):
        compared(model, directory, int4=1e-9)


@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_are_rounded_as_the_runtime_rounds_them(bits, model, directory):
    """Without rounded activations, the graph and PyTorch with rounded matrices compute the same."""
    graph, path = {8: "int8", 4: "int4"}[bits], directory / "exact.onnx"
    program = onnx.load(directory / hub_layout.file_of(graph))
    for node in program.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # activations in float32
    onnx.save(program, path)
    exact = hub_layout.HubGraph(path, model.config, default_options())
    path.unlink()
    assert logit_difference(expected(rounded(model, bits)), exact) < 1e-4
    assert logit_difference(expected(model), exact) > 1e-3
    assert model.lm_head.weight.equal(model.get_output_embeddings().weight)  # the model itself is as it was


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_wrong_graph_in_few_bits_is_noticed(dtype, model, directory, tmp_path):
    """What rounding to 4 bits alone does is far more than the tolerance; a graph that does another thing is found."""
    copied = shutil.copytree(directory, tmp_path / "copied")
    path = copied / hub_layout.file_of(dtype)
    program = onnx.load(path)
    product = next(node for node in program.graph.node if node.op_type == "MatMulNBits")
    scales = next(value for value in program.graph.initializer if value.name == product.input[2])
    values = onnx.numpy_helper.to_array(scales)
    scales.CopyFrom(onnx.numpy_helper.from_array(-values, scales.name))
    onnx.save(program, path)
    with pytest.raises(ExportError, match=f"{hub_layout.file_of(dtype)} differs from the PyTorch model"):
        compared(model, copied)


@pytest.mark.slow
def test_real_layers_write_pytorchs_text(real_pruned, tmp_path):
    """In GenAI and in Transformers.js; the graphs in 8 and 4 bits pass their own comparison with PyTorch."""
    pruned = PrunedModel.from_pretrained(real_pruned / "model", dtype=torch.float32)
    model = shortened(pruned.model, 2)
    directory = export_model(model, pruned.tokenizer, "onnx", tmp_path / "real", layout="hub")
    written = in_pytorch(model, pruned.tokenizer)
    check_genai(directory, written)
    assert in_transformers_js("fp32", directory) == written[1]
