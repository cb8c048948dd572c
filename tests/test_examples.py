"""Every example runs, as a user would start it, on a tiny chat model and with a small default of everything."""

from __future__ import annotations

import json
import re
import runpy
from itertools import cycle
from pathlib import Path

import huggingface_hub.constants
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from support.endpoint_server import Server
from support.tiny import tiny_model, tiny_pruned
from support.trained import TEXT, VOCABULARY, trained_tokenizer

from selfpruner_hub import AutoPruner, PrunedModel, settings
from selfpruner_hub.calibration import text_sources
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.recovery import texts

EXAMPLES = Path(__file__).parents[1] / "examples"
LONGEST = 40
"""Lines of an example."""
SMALL = {
    "window": 32,
    "calibration_tokens": 1024,
    "fisher_tokens": 256,
    "fitness_tokens": 256,
    "evaluations": 2,
    "schedule": {"population": 2, "crossover": 1, "mutation": 1},
}
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny-chat"
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=512, num_hidden_layers=2)
    tiny.generation_config.eos_token_id = list(range(2, VOCABULARY, 10))  # random weights end their turns too
    tiny.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Small defaults, a text in place of WikiText-2, and a directory for what examples write."""
    monkeypatch.setitem(settings.PRESETS, "default", settings.resolve(None, **SMALL))
    monkeypatch.setattr(text_sources, "_hub_texts", lambda source, split: cycle(TEXT))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example and give back what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run_here():
    tests = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.iterdir() if f'"{path.name}"' not in tests and path.is_file()] == []


def test_the_configuration_of_accelerate_is_one_of_fsdp2():
    config = load_config_from_file(str(EXAMPLES / "fsdp.yaml"))  # tests/recovery/test_ranks.py runs with it
    assert config.distributed_type == DistributedType.FSDP
    assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_prune(run, model):
    said = run("01_prune.py", model)
    report = PrunedModel.from_pretrained("pruned-b30").report
    assert f"{report.parameters['pruned']:,} of {report.parameters['dense']:,} parameters are left." in said
    assert "The capital of France is" in said
    assert report.data["calibration"]["name"] == "chat and wikitext2"


def test_prune_on_own_text(run, model, tmp_path):
    talk = [{"role": "user", "content": TEXT[0]}, {"role": "assistant", "content": TEXT[1]}]
    own = tmp_path / "conversations.jsonl"
    own.write_text("\n".join(json.dumps({"messages": talk}) for _ in range(40)))
    said = run("02_prune_on_own_text.py", model, own)
    assert "calibration: 1024 tokens of conversations.jsonl and wikitext2" in said
    assert PrunedModel.from_pretrained("pruned-own-text").report.method["shares"] == [3, 1]


@pytest.mark.heavy
def test_export_and_generate(run, model):
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    assert "The capital of France is" in run("03_export_and_generate.py", model)
    assert Path("pruned-gguf/model-f16.gguf").is_file()


@pytest.mark.heavy
def test_endpoint_proposer(run, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = Server(json.dumps({"attention": [0, 25, 0, 25], "ffn": [30, 20, 40, 25]}))
    said = run("04_endpoint_proposer.py", model, server.url, "m")
    assert f"{100 * len(server.bodies)} tokens were read and written." in said
    report = PrunedModel.from_pretrained("pruned-by-endpoint").report
    assert report.proposer["name"] == "m behind an OpenAI-compatible endpoint"
    assert report.proposer["options"] == {"temperature": 1.0, "request_limit": 200, "token_limit": 1_000_000}


def test_custom_proposer(run, model):
    assert "The best plan came from " in run("05_custom_proposer.py", model)
    assert PrunedModel.from_pretrained("pruned-by-noisy-copies").report.proposer["name"] == "noisy copies"


def test_pipeline_by_hand(run, model):
    assert "parameters are left." in run("06_pipeline_by_hand.py", model, 1024)
    assert Path("pruned-by-hand/model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantize_torchao(kind, run, tmp_path):
    """Layers of their own widths, most of them with inputs that groups of 32 do not divide."""
    pytest.importorskip("torchao", reason='needs pip install "torchao>=0.18,<0.19"')
    pruned = tiny_pruned("llama", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96)
    pruned.save_pretrained(tmp_path / "saved")
    trained_tokenizer().save_pretrained(tmp_path / "saved")
    widths = [module.in_features for name, module in pruned.named_modules() if name.endswith("_proj")]
    quantised = len(widths) if kind == "int8" else sum(width % 32 == 0 for width in widths)
    assert 0 < sum(width % 32 == 0 for width in widths) < len(widths)
    said = run("07_quantize_torchao.py", tmp_path / "saved", kind)
    assert f"{quantised} of {len(widths) + 1} matrices are in {kind}." in said
    assert "The capital of France is" in said
    assert load_model(f"pruned-{kind}", device="cpu")[0].num_parameters() == pruned.num_parameters()
    changed = float(re.search(r"changes by ([\d.]+) at most", said)[1])
    assert 0 < changed < {"int8": 1, "int4": 10}[kind]
    sizes = [(Path(path) / "model.safetensors").stat().st_size for path in (tmp_path / "saved", f"pruned-{kind}")]
    assert sizes[1] < sizes[0] / 2  # saved in float32


def test_quantise_uniform(run, tmp_path):
    """To FP8 weights; the embeddings and the head stay in bfloat16."""
    pytest.importorskip("torchao", reason='needs pip install "torchao>=0.18,<0.19"')
    dense = tiny_model("llama", vocab_size=VOCABULARY, hidden_size=64)
    pruner = AutoPruner(dense, trained_tokenizer(), "tests/llama")
    pruner.prune(0.2, data="self", uniform=True, evaluations=0, progress=False).save_pretrained(tmp_path / "saved")
    said = run("10_quantise_uniform.py", tmp_path / "saved")
    assert "The capital of France is" in said
    assert 0 < float(re.search(r"changes by ([\d.]+) at most", said)[1]) < 5
    sizes = [(Path(path) / "model.safetensors").stat().st_size for path in (tmp_path / "saved", "uniform-fp8")]
    assert sizes[1] < sizes[0] / 2  # saved in float32
    assert not list(Path("uniform-fp8").glob("*.py"))


def test_recover_with_lora(run, model, tmp_path):
    """A model of random weights learns a text: its perplexity falls, and the record has no older figures."""
    pytest.importorskip("peft", reason='needs pip install "peft>=0.21,<0.22"')
    run("01_prune.py", model)
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 200))
    said = run("08_recover_with_lora.py", "pruned-b30", tmp_path / "text.txt", tmp_path / "text.txt", 30)
    before, after = map(float, re.search(r"perplexity.*: ([\d.]+) before, ([\d.]+) after", said).groups())
    assert after < 0.9 * before
    report = PrunedModel.from_pretrained("pruned-b30-lora").report
    assert report.method["training"] == ("LoRA of rank 16 on all linear layers, 30 steps of 4 x 256 tokens of text.txt")
    assert [name for name in report.metrics if name.startswith("search_")] == []
    assert report.plan == PrunedModel.from_pretrained("pruned-b30").plan


def test_recover(run, model, monkeypatch):
    monkeypatch.setattr(texts, "DECIDING_WINDOWS", 1)
    said = run("09_recover.py", model, 8192)
    assert PrunedModel.from_pretrained("recovered-b30").report.base_model == "tiny-chat"
    assert said.count("KL from the parent on") in (0, 3)  # random weights may have nothing to recover


def test_notebook(model, monkeypatch, capsys):
    monkeypatch.setenv("MODEL", model)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    values = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "clear the outputs before a commit"
            exec("".join(cell["source"]), values)
    said = capsys.readouterr().out
    assert said.count("The capital of France is") == 2
    assert "layer  2:" in said
    assert values["again"].num_parameters() == PrunedModel.from_pretrained("pruned-b30").report.parameters["pruned"]
