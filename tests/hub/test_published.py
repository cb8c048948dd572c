"""A model that went the whole way, pruned and pushed by command lines, with exports and Space: what a stranger finds.

Tokens, keys and paths are planted on the way; none of them may be in any file that is published.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.hub_client import environment
from support.hub_server import check_yaml
from support.processes import run_python
from support.tiny import tiny_model
from support.trained import VOCABULARY, trained_tokenizer

from selfpruner_hub.storage.model_record import read_record

pytestmark = pytest.mark.slow
NAME = "me/whole-way"
PLANTED = "pl4nted"
TOKEN = "hf_write_token_of_me"
KEYS = {name: f"{PLANTED}-{name.lower()}" for name in ("SELFPRUNER_API_KEY", "OPENAI_API_KEY", "MY_PASSWORD")}
EXPORTS = ("--with", "onnx", "gguf")
SMALL = [
    *("--set", "calibration_tokens=640", "--set", "fitness_tokens=128", "--set", "window=32"),
    *("--set", 'seeds=["uniform", "ramp"]', "--proposer", "evolution", "--evaluations", "3", "--quiet"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder whose own name is planted, with a dense model and a text."""
    pytest.importorskip("onnxruntime", reason='needs pip install -e ".[onnx]"')
    pytest.importorskip("xllamacpp", reason='needs pip install -e ".[gguf]"')
    work = tmp_path_factory.mktemp(PLANTED)
    tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2).save_pretrained(work / "dense")
    trained_tokenizer().save_pretrained(work / "dense")
    words = ["the", "quick", "brown", "fox", "and", "a", "lazy", "dog"]
    (work / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=3000)))
    return work


@pytest.fixture(scope="module")
def run(hub_client, work):
    """Run a command line with secrets in its environment; it must succeed."""

    def run(*words):
        done = hub_client(*words, HF_TOKEN=TOKEN, **KEYS)
        assert done.status == 0, done.err
        return done.out

    def prune(beta="0.3"):
        run(
            "prune",
            work / "dense",
            "--base-model",
            "tests/llama",
            "--beta",
            beta,
            "--data",
            work / "text.txt",
            "--output",
            work / "model",
            *SMALL,
        )

    run.prune = prune
    return run


@pytest.fixture(scope="module")
def files(hub, run, work):
    """Every file of the model, of its graphs and of its Space, by path."""
    run.prune()
    run("push", work / "model", NAME, "--space", *EXPORTS, "--quiet")
    space = {f"space/{path}": content for path, content in hub.files(f"{NAME}-demo", "space").items()}
    graphs = {f"graphs/{path}": content for path, content in hub.files(f"{NAME}-ONNX").items()}
    return {**hub.files(NAME), **graphs, **space}


def test_exports_are_there(files):
    graphs = ("graphs/onnx/model.onnx", "graphs/selfpruner_export.json")
    for path in (*graphs, "gguf/model-f16.gguf", "gguf/selfpruner.json"):
        assert path in files


def test_nothing_planted_is_published(files, work):
    needles = {
        *(PLANTED, TOKEN, str(work), str(Path(__file__).parents[2])),
        *(sys.prefix, str(Path(sys.executable).resolve().parent)),
    }
    assert len(files) > 60
    for path, content in files.items():
        found = [needle for needle in needles if needle.encode() in content]
        assert not found, f"{path} holds {found}"


def test_what_is_planted_in_the_files_themselves_is_not_published(hub, hub_client, run, files, work):
    before = hub.files(NAME)
    journal = work / "model" / "search.jsonl"
    text = journal.read_text()
    journal.write_text(text.replace('"evolution"', f'"{KEYS["SELFPRUNER_API_KEY"]}"', 1))
    done = hub_client("push", work / "model", NAME, "--quiet", HF_TOKEN=TOKEN, **KEYS)
    journal.write_text(text)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("selfpruner: search.jsonl holds the value of SELFPRUNER_API_KEY; nothing was published.")
    assert hub.files(NAME) == before


def test_the_card_is_valid_and_its_numbers_are_those_of_the_record(files, work):
    card = ModelCard(files["README.md"].decode())
    record = read_record(work / "model")
    assert check_yaml(str(card)) == []
    assert card.data.library_name == "transformers"
    assert {"gguf", "pruned"} <= set(card.data.tags)
    for value in (f"{record.parameters['pruned']:,}", f"{record.achieved_beta}", record.data["fitness"]["tokens"]):
        assert str(value) in card.text
    for layer, rate in enumerate(record.rates, 1):
        groups, channels = (record.widths[key][layer - 1] for key in ("num_key_value_heads", "intermediate_size"))
        assert f"| {layer} | {100 * rate:.1f} % | {groups} | {channels} |" in card.text


RUN_BLOCKS = """
import re, sys
from huggingface_hub import hf_hub_download
card = open(hf_hub_download(sys.argv[1], "README.md")).read()
for block in re.findall(r"```python\\n(.*?)```", card, re.DOTALL):
    if "selfpruner_hub" not in block and "exporters" not in block:
        sys.modules["selfpruner_hub"] = None  # as in an environment that has only torch and transformers
    exec(block, {})
    sys.modules.pop("selfpruner_hub", None)
    print("--- end of block", flush=True)
"""


def run_blocks(name, hub, tmp_path):
    """Run the Python of a card; what each block prints."""
    done = run_python(RUN_BLOCKS, name, env=environment(hub.url, tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[y/N]" not in done.stdout
    return done.stdout.split("--- end of block\n")[:-1]


def test_the_code_of_the_card_runs(files, hub, tmp_path):
    plain, package, gguf = run_blocks(NAME, hub, tmp_path)
    assert plain == package  # the same model, so the same greedy text
    assert "The capital of France is" in plain
    assert len(plain) > len("<s>The capital of France is") + 5
    assert gguf.strip()


def test_the_code_of_the_graphs_card_runs(files, hub, tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="needs pip install onnxruntime-genai")
    (written,) = run_blocks(f"{NAME}-ONNX", hub, tmp_path)
    prompt, _, more = written.partition("The capital of France is")
    assert not prompt
    assert more.strip()  # a random model writes few letters, and not the same number everywhere


def test_a_second_push_makes_no_export_anew(files, hub, run, work):
    made = {path: path.stat().st_mtime_ns for path in (work / "model").rglob("*") if path.is_file()}
    hub.reset()
    out = run("push", work / "model", NAME, "--space", *EXPORTS, "--quiet")
    assert out.splitlines()[0].endswith("(it was up to date)")
    assert hub.received == 0
    assert made == {path: path.stat().st_mtime_ns for path in (work / "model").rglob("*") if path.is_file()}


def test_exports_of_an_older_model_are_refused_or_made_anew(files, hub, hub_client, run, work):
    """Last, since it changes what is published."""
    old = hub.files(NAME)
    run.prune("0.4")
    done = hub_client("push", work / "model", NAME, "--quiet", HF_TOKEN=TOKEN, **KEYS)
    assert done.status == 2
    assert "is an export of another model" in done.err
    shutil.rmtree(work / "model" / "onnx")
    run("push", work / "model", NAME, "--with", "gguf", "--quiet")
    new = hub.files(NAME)
    assert new["gguf/model-f16.gguf"] != old["gguf/model-f16.gguf"]
    assert read_record(work / "model" / "gguf").beta == 0.4
    assert f"{NAME}-ONNX" not in new["README.md"].decode()  # its graphs are of other weights
