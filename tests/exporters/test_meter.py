"""Costs that are measured: of every width, once for a machine, and of the result beside what was predicted."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny import tiny_model, tiny_pruned
from support.trained import VOCABULARY, trained_tokenizer
from transformers import AutoConfig

from exporters.benchmark import meter
from exporters.benchmark.meter import RuntimeMeter
from exporters.runtime import Measured
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.placement import streamed
from selfpruner_hub.plans.target import target_of
from selfpruner_hub.storage import cost_table

REQUEST = (16, 4)
GROUP, CHANNEL, CONSTANT = 3.0, 0.25, 40.0
"""Milliseconds of the prompt in the scripted runtime; a token takes a tenth."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(meter, "RUNS", 3)


class Scripted:
    """Takes the time that the widths of a model say, on a machine that is twice as slow in every second turn."""

    loaded: list[tuple[int, int, int]] = []

    def __init__(self, directory, _setting):
        layers = shape_of(AutoConfig.from_pretrained(directory)).dense.layers
        self.loaded.append((len(layers), layers[0].num_key_value_heads, layers[0].intermediate_size))
        work = sum(GROUP * w.num_key_value_heads + CHANNEL * w.intermediate_size for w in layers)
        self.milliseconds, self.calls = CONSTANT + work, 0

    def measure(self, ids, new_tokens):
        assert ids.shape == (1, REQUEST[0])
        self.calls += 1
        slow = 1 + self.calls // 2 % 2
        return Measured(slow * self.milliseconds, slow * self.milliseconds / 10)


@pytest.fixture
def scripted(monkeypatch):
    """A meter whose runtime is scripted; PyTorch's files, so that nothing is exported."""
    made = RuntimeMeter("torch")
    made._row = replace(made._row, load=Scripted)
    monkeypatch.setattr(Scripted, "loaded", [])
    return made


def speedup(runtime="torch"):
    return target_of({"speedup": 1.2}, runtime, REQUEST)


def nothing(*_told):
    """Report nothing."""


@pytest.mark.parametrize("most", [10**9, 1])
def test_the_costs_are_those_that_the_runtime_charges(most, scripted, monkeypatch):
    """Also where the measured models have fewer layers than the dense one."""
    monkeypatch.setattr(meter, "LAYER_WEIGHTS", most)
    ticks = []
    costs = scripted.costs(tiny_model("llama"), None, speedup(), lambda *told: ticks.append(told))
    times = costs.dense / (CONSTANT + 4 * (4 * GROUP + 48 * CHANNEL))  # of the scripted milliseconds: turns differ
    assert costs.constant == pytest.approx(times * CONSTANT)
    for attention, ffn in zip(costs.attention, costs.ffn, strict=True):
        assert attention == pytest.approx(times * GROUP * np.arange(5))
        assert ffn == pytest.approx(times * CHANNEL * np.arange(49))
    few = 4 if most > 1 else 2
    assert {size[0] for size in Scripted.loaded} == {4, few}
    assert len(Scripted.loaded) == len(set(Scripted.loaded))  # no model is measured twice
    assert ticks[-1][1] == ticks[-1][2]
    assert [done for _, done, _ in ticks] == sorted(done for _, done, _ in ticks)


def test_costs_are_measured_once(scripted):
    model = tiny_model("llama")
    first = scripted.costs(model, None, speedup(), nothing)
    measured = list(Scripted.loaded)
    assert scripted.costs(tiny_model("llama", seed=1), None, speedup(), nothing).digest() == first.digest()
    memory = target_of({"memory": 0.7}, "torch", REQUEST)
    for _ in range(2):
        assert scripted.costs(model, None, memory, nothing).unit == "bytes"
    assert Scripted.loaded == measured  # files are not timed, and have a table of their own
    assert len(list(cost_table.folder().iterdir())) == 2
    for other in ({"num_hidden_layers": 3}, {"tie_word_embeddings": True}, {"mlp_bias": True}):
        scripted.costs(tiny_model("llama", **other), None, speedup(), nothing)
        assert len(Scripted.loaded) > len(measured)
        measured = list(Scripted.loaded)


def test_the_result_is_measured_beside_the_dense_model(scripted):
    dense, pruned = tiny_model("llama"), tiny_pruned("llama")
    costs = scripted.costs(dense, None, speedup(), nothing)
    before, after = scripted.measure(dense, pruned, None, speedup(), nothing)
    plan = shape_of(pruned.config).dense
    assert before / after == pytest.approx(costs.dense / costs.of(plan))
    memory = target_of({"memory": 0.7}, "torch", REQUEST)
    loaded = len(Scripted.loaded)
    sizes = scripted.measure(dense, pruned, None, memory, nothing)
    assert len(Scripted.loaded) == loaded
    predicted = scripted.costs(dense, None, memory, nothing)
    assert sizes[0] == pytest.approx(predicted.dense, rel=0.05)  # headers of tiny files
    assert sizes[1] == pytest.approx(predicted.of(plan), rel=0.05)


def test_as_many_passes_as_asked_for(scripted, monkeypatch):
    made, ticks = RuntimeMeter("torch", runs=5), []
    monkeypatch.setattr(made, "_row", scripted._row)
    made.measure(tiny_model("llama"), tiny_pruned("llama"), None, speedup(), lambda *told: ticks.append(told))
    assert ticks[-1][2] == 2 * (2 + meter.METER_WARMUP + 5)  # written, loaded


def test_a_load_that_is_slow_as_long_as_it_lasts_does_not_count(scripted, monkeypatch):
    """Each model is loaded anew after some passes; here the first load of the pruned one takes twice as long."""
    dense, pruned, loads = tiny_model("llama"), tiny_pruned("llama"), []

    def load(directory, setting):
        runner = Scripted(directory, setting)
        loads.append(directory)
        if loads.count(directory) == 1 and len(set(loads)) == 2:
            runner.milliseconds *= 2
        return runner

    made = RuntimeMeter("torch", runs=3 * meter.RUNS_OF_A_LOAD)
    monkeypatch.setattr(made, "_row", replace(scripted._row, load=load))
    found = made.measure(dense, pruned, None, speedup(), nothing)
    assert len(loads) == 2 * 3
    work = [CONSTANT + sum(GROUP * w.num_key_value_heads + CHANNEL * w.intermediate_size for w in layers)
            for layers in (shape_of(model.config).dense.layers for model in (dense, pruned))]  # fmt: skip
    assert found[0] / found[1] == pytest.approx(work[0] / work[1])


def test_a_kv_cache_is_counted():
    dense, pruned = tiny_model("qwen3"), tiny_pruned("qwen3")
    target = target_of({"kv_cache": 0.5}, "torch")
    costs = RuntimeMeter("torch").costs(dense, None, target, nothing)
    assert costs.dense == 2 * 8 * 4 * 4 * 4  # keys and values, 8 wide, 4 heads in 4 layers, float32
    before, after = RuntimeMeter("torch").measure(dense, pruned, None, target, nothing)
    assert (before, after) == (costs.dense, costs.of(shape_of(pruned.config).dense))
    assert not cost_table.folder().exists()


def test_no_whole_model_is_built_beside_one_in_files(scripted):
    with streamed(model := tiny_model("llama")):
        for goal in ({"speedup": 1.2}, {"memory": 0.7}):
            with pytest.raises(UserError, match="this one rests in files"):
                scripted.costs(model, None, target_of(goal, "torch", REQUEST), nothing)
        assert scripted.costs(model, None, target_of({"kv_cache": 0.5}, "torch"), nothing).dense
    assert not Scripted.loaded


@pytest.mark.parametrize("name", ["gemma3", "phi3", "llama-mha-tied", "olmo2", "gemma-mqa"])
def test_every_kind_of_model_is_measured_in_pytorch(name):
    model = tiny_model(name)
    sizes = RuntimeMeter("torch").costs(model, None, target_of({"memory": 0.7}, "torch", (4, 1)), nothing)
    shape = shape_of(model.config)
    assert sizes.ffn[0][-1] == pytest.approx(4 * 48 * shape.unit_weights, rel=0.2)
    assert bool(sizes.attention[0].any()) == (not shape.whole_attention and name != "gemma-mqa")


@pytest.mark.parametrize(("runtime", "groups"), [pytest.param("onnx", 1, marks=pytest.mark.slow), ("gguf", 2)])
def test_a_runtime_charges_the_bytes_of_its_files(runtime, groups, monkeypatch):
    """Real exports, loaded and timed too; tiny models are all overhead, so only the bytes are certain.

    A model with one KV head is exported once less.
    """
    monkeypatch.setattr(meter, "FFN_SHARES", (0.5,))
    pytest.importorskip({"onnx": "onnxruntime", "gguf": "xllamacpp"}[runtime])
    model = tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=1, num_key_value_heads=groups)
    target = target_of({"memory": 0.7}, runtime, (8, 2))
    costs = RuntimeMeter(runtime).costs(model, trained_tokenizer(), target, nothing)
    each = {"onnx": 4, "gguf": 2}[runtime]
    assert costs.ffn[0][-1] == pytest.approx(each * 48 * 3 * 32, rel=0.1)
    (of_bytes,) = cost_table.folder().iterdir()
    RuntimeMeter(runtime).costs(model, trained_tokenizer(), target_of({"latency": 1}, runtime, (8, 2)), nothing)
    (of_times,) = set(cost_table.folder().iterdir()) - {of_bytes}
    points = json.loads(of_times.read_text())["points"]
    assert all(point["prefill"] > 0 and point["decode"] > 0 for point in points)


def test_runtimes_that_cannot_be_metered_are_refused_in_one_line():
    for name, python, says in (
        ("tensorrt", None, "torch, onnx, gguf, vllm"),
        ("openvino", None, "torch, onnx, gguf, vllm"),
        ("abacus", None, "torch, onnx, gguf, vllm"),
        ("vllm", None, "Name its Python: --python PATH/bin/python."),
        ("gguf", "/bin/python", "gguf runs in this Python."),
    ):
        with pytest.raises(UserError) as refused:
            RuntimeMeter(name, python=python)
        assert "\n" not in str(refused.value)
        assert says in str(refused.value)


@pytest.mark.parametrize(("kind", "where"), [("cuda:1", ("cuda:1", "bfloat16")), ("mps", ("cpu", "bfloat16"))])
def test_pytorch_is_measured_as_the_model_is_run(kind, where, scripted, monkeypatch):
    """In its dtype, and on its device if that is a CUDA device."""
    model, seen = tiny_model("llama").bfloat16(), []
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device(kind)))

    def load(directory, setting):
        seen.append((setting.device, setting.dtype))
        return Scripted(directory, setting)

    scripted._row = replace(scripted._row, load=load)
    scripted.costs(model, None, speedup(), nothing)
    sizes = scripted.costs(model, None, target_of({"memory": 0.7}, "torch", REQUEST), nothing)
    assert set(seen) == {where}
    assert sizes.ffn[0][-1] == pytest.approx(2 * 48 * 3 * 32, rel=0.1)  # bytes in bfloat16
    element = scripted.costs(model, None, target_of({"kv_cache": 0.5}, "torch"), nothing).dense
    assert element == 2 * 4 * 4 * 4 * 2  # keys and values, 4 wide, 4 heads in 4 layers


def test_exports_are_measured_in_half_on_a_gpu(monkeypatch):
    made, model = RuntimeMeter("onnx"), tiny_model("llama")
    assert (made._device(model), made._dtype(model, "cpu")) == ("cpu", "float32")
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda", 0)))
    assert (made._device(model), made._dtype(model, "cuda:0")) == ("cuda:0", "float16")
    assert RuntimeMeter("gguf")._device(model) == "cpu"
