"""`selfpruner verify`: every format beside its PyTorch model, what was changed since, and what it cannot compare."""

from __future__ import annotations

import importlib.util
import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from support.exports import OPTIONS
from support.tiny import tiny_model, tiny_pruned
from support.trained import VOCABULARY, trained_tokenizer
from transformers import GenerationConfig

from exporters.export import export_model
from exporters.to_gguf.dtypes import GGUF_DTYPES
from exporters.to_tensorrt import causal_lm
from selfpruner_hub.cli import main
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, read_export

PROMPT, NEW = "In 1984 they counted", 6
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 2}
"""Rows of 256, one block of a K-quant."""
EXPORTS = {
    **{f"gguf {dtype}": {"dtype": dtype} for dtype in GGUF_DTYPES},
    "onnx": {},
    "onnx int8": {"dtype": "int8"},
    "onnx hub": {"layout": "hub"},
    "openvino": {},
}
"""Options by format and a word for them."""
CASES = [pytest.param(name, marks=pytest.mark.heavy if name[:2] in ("on", "op") else ()) for name in EXPORTS]
EXACT = ("gguf f32", "onnx", "openvino")
LIBRARY = {"onnx": "onnxruntime", "openvino": "openvino", "gguf": "xllamacpp"}


def save(directory, seed=0, **changes):
    """Save a pruned model that is sure of its answers, and whose layers change them little when they are rounded."""
    model = tiny_pruned("llama", seed=seed, **{**WIDE, **changes})
    for name, parameter in model.named_parameters():
        if "norm" not in name and "lm_head" not in name:
            parameter.data *= 0.3
    model.save_pretrained(directory)
    trained_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the model in `tiny`; exports of it are made beside that."""
    home = tmp_path_factory.mktemp("verify")
    save(home / "tiny")
    return home


@pytest.fixture(scope="module")
def source(home, request):
    """A function: the directory of the model of an export."""
    return lambda name: request.getfixturevalue("saved_graphs") / "model" if name == "onnx hub" else home / "tiny"


@pytest.fixture(scope="module")
def exported(home, source):
    """A function: the directory of an export, made once."""

    def exported(name):
        to = name.split()[0]
        if to in LIBRARY:
            pytest.importorskip(LIBRARY[to])
        if name == "onnx hub":
            return source(name) / "onnx"  # made once a run
        directory = home / name.replace(" ", "-")
        if not directory.is_dir():
            model, tokenizer = load_model(str(home / "tiny"), device="cpu", dtype=torch.float32)
            export_model(model, tokenizer, to, directory, name="tiny", **EXPORTS[name])
        return directory

    return exported


@pytest.fixture
def run(capsys):
    def run(*words):
        capsys.readouterr()  # bars of what a test has loaded itself
        status = main(["verify", *map(str, words), "--quiet"])
        out, err = capsys.readouterr()
        assert err.count("\n") == (status != 0)
        return status, out, err

    return run


@pytest.fixture
def verified(run):
    def verified(directory, *words):
        status, out, _ = run(directory, "--prompt", PROMPT, "--new-tokens", NEW, "--json", *words)
        return status, json.loads(out)

    return verified


@pytest.mark.parametrize("name", CASES)
def test_an_export_is_its_model(name, exported, verified, source):
    status, told = verified(exported(name))
    assert (status, told["verified"]) == (0, True)
    assert (told["model"], told["prompt"]) == (str(source(name)), PROMPT)
    model, tokenizer = load_model(str(source(name)), device="cpu", dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    own = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
    assert told["tokens"] == own
    assert told["text"] == tokenizer.decode(own)
    record = read_export(exported(name))
    first, *others = told["files"]
    assert first["tolerance"] == record.tolerance
    if name == "onnx int8":
        parameters = sum(p.numel() for p in model.parameters())
        assert (exported(name) / "model.onnx.data").stat().st_size < 2.4 * parameters + 2**16
    rounded = ("onnx/model_quantized.onnx", "onnx/model_q4.onnx", "model.onnx" if name == "onnx int8" else "")
    for file in told["files"]:
        measured = "log-probability" if name.startswith("gguf") else "logit"
        assert file["measured"] == ("KL divergence" if file["file"] in rounded else measured)
    assert len(others) == (3 if name == "onnx hub" else 0)
    for file in told["files"]:
        assert file["difference"] <= file["tolerance"]
        assert (file["differs_at"] is None) == (file["tokens"] == own)
    if name in EXACT:
        assert first["differs_at"] is None
        assert first["difference"] < 1e-3
    else:
        assert max(file["difference"] for file in told["files"]) > 1e-5


def negate(weights):
    """Change the sign of a third of the values."""
    third = len(weights) // 3
    weights[third : 2 * third] = -weights[third : 2 * third]


def weights_of(path, name):
    """The values of a tensor of a GGUF file, in place."""
    return next(tensor for tensor in GGUFReader(path, "r+").tensors if tensor.name == name).data


def change_weight(directory, name):
    """Change weights of an export; return the name of the file that must be noticed."""
    if name.startswith("gguf"):
        path = directory / f"model-{name.split()[1]}.gguf"
        norm = weights_of(path, "output_norm.weight")
        norm[:] = -3 * norm  # float32 in every dtype
        return path.name
    if name == "openvino":
        data = [layer.find("data") for layer in ElementTree.parse(directory / "openvino_model.xml").iter("layer")]
        constants = [part.attrib for part in data if part is not None and "offset" in part.attrib]
        largest = max(constants, key=lambda constant: int(constant["size"]))
        where, count = int(largest["offset"]), int(largest["size"]) // 4
        negate(np.memmap(directory / "openvino_model.bin", np.float32, "r+", offset=where, shape=(count,)))
        return "openvino_model.xml"
    if name == "onnx hub":
        negate(np.memmap(directory / "onnx/model_fp16.onnx_data", np.float16, "r+"))
        return "onnx/model_fp16.onnx"
    negate(np.memmap(directory / "model.onnx.data", np.float32 if name == "onnx" else np.int8, "r+"))
    return "model.onnx"


@pytest.mark.parametrize("name", CASES)
def test_a_changed_weight_is_noticed(name, exported, verified, source, tmp_path):
    directory = shutil.copytree(exported(name), tmp_path / "changed")
    file = change_weight(directory, name)
    status, told = verified(directory, "--model", source(name))
    assert (status, told["verified"]) == (1, False)
    assert told["error"].startswith(f"{file} differs from the PyTorch model by ")
    within = {f["file"]: f["difference"] is not None and f["difference"] <= f["tolerance"] for f in told["files"]}
    assert [each for each, good in within.items() if not good] == [file]


def test_side_by_side(exported, run, verified, home, tmp_path):
    """The first token that differs, the largest difference, and one line on stderr with status 1."""
    words = [exported("gguf f32"), "--prompt", PROMPT, "--new-tokens", NEW]
    status, out, _ = run(*words)
    tokens = verified(exported("gguf f32"))[1]["tokens"]
    text = trained_tokenizer().decode(tokens)
    assert (status, out.splitlines()[:3]) == (
        0,
        [f"prompt          {PROMPT!r}", f"PyTorch         {text!r}", f"model-f32.gguf  {text!r}"],
    )
    assert f"all {NEW} tokens are PyTorch's; a log-probability differs from PyTorch's float32 by" in out
    at = next(index for index in range(1, NEW) if tokens[index] not in tokens[:index])
    directory = shutil.copytree(exported("gguf f32"), tmp_path / "changed")
    weights_of(directory / "model-f32.gguf", "output.weight")[tokens[at]] *= -1
    status, out, err = run(directory, *words[1:], "--model", home / "tiny")
    assert status == 1
    assert (
        f"model-f32.gguf: token {at + 1} of {NEW} is the first that is not PyTorch's; a log-probability differs" in out
    )
    assert err.startswith("selfpruner: model-f32.gguf differs from the PyTorch model by ")


def test_both_stop_at_an_end_token(exported, verified, home, tmp_path):
    tokens = verified(exported("gguf f32"))[1]["tokens"]
    ending = shutil.copytree(home / "tiny", tmp_path / "ending")
    GenerationConfig(eos_token_id=[tokens[2], 3]).save_pretrained(ending)
    told = verified(exported("gguf f32"), "--model", ending)[1]
    assert told["tokens"] == told["files"][0]["tokens"] == tokens[: tokens.index(tokens[2]) + 1]


def test_llama_cpps_own_end_token(verified, tmp_path):
    """llama.cpp says nothing of the text of an end token, and its log-probability is compared all the same."""
    pytest.importorskip("xllamacpp")
    model, tokenizer = load_model(str(save(tmp_path / "tiny")), device="cpu", dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    step = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    hidden = model.model(step).last_hidden_state[0, -1].detach()
    model.lm_head.weight.data[tokenizer.eos_token_id] = 100 * hidden / hidden.norm() ** 2
    model.save_pretrained(tmp_path / "tiny")
    export_model(model, tokenizer, "gguf", tmp_path / "out", name="tiny", dtype="f32")
    status, told = verified(tmp_path / "out")
    assert status == 0
    assert told["tokens"] == told["files"][0]["tokens"] == [tokenizer.eos_token_id]
    assert 0 < told["files"][0]["difference"] < 1e-3


def test_the_model_is_found(exported, verified, home, tmp_path, monkeypatch):
    """An export inside the directory of its model, as it is published; one beside it; one here."""
    inside = shutil.copytree(home / "tiny", tmp_path / "a" / "published")
    shutil.copytree(exported("gguf f32"), inside / "gguf")
    assert verified(inside / "gguf")[1]["model"] == str(inside)
    shutil.copytree(exported("gguf f32"), tmp_path / "elsewhere" / "out")
    monkeypatch.chdir(home)
    assert verified(tmp_path / "elsewhere" / "out")[1]["model"] == "tiny"


def test_mistakes(exported, run, home, tmp_path):
    export = exported("gguf f32")
    alone = shutil.copytree(export, tmp_path / "alone")
    (tmp_path / "without").mkdir()
    nameless = shutil.copytree(home / "tiny", tmp_path / "nameless")
    for path in (*nameless.glob("tokenizer*"), *nameless.glob("special*")):
        path.unlink()
    tiny_model("qwen2").save_pretrained(tmp_path / "qwen2")
    for words, says in (
        ([tmp_path / "nowhere"], "holds no export (no readable selfpruner_export.json)"),
        ([home / "tiny"], "holds no export"),
        ([alone], "The model that was exported (tiny) is not beside the export. Name its directory"),
        ([export, "--model", tmp_path / "nowhere"], "Cannot find"),
        ([export, "--model", tmp_path / "without"], "holds no model"),
        ([export, "--model", tmp_path / "qwen2"], "it has model_type qwen2, not selfpruned_llama."),
        ([export, "--model", save(tmp_path / "thin", intermediate_size=480)], "it has parameters "),
        ([export, "--model", save(tmp_path / "other", seed=1)], "it has other weights."),
        ([export, "--model", nameless], "has no tokenizer, and a prompt needs one."),
        ([export, "--new-tokens", 0], "At least one new token is needed; got 0."),
        ([export, "--new-tokens", 128], "they are more than the 128 that the export takes."),
    ):
        status, out, err = run(*words)
        assert (status, out) == (2, "")
        assert says in err


def test_a_prompt_without_tokens(exported, run, home, tmp_path):
    bare = shutil.copytree(home / "tiny", tmp_path / "bare")
    tokenizer = trained_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(bare)
    status, _, err = run(exported("gguf f32"), "--model", bare, "--prompt", "")
    assert status == 2
    assert "The prompt has no tokens." in err


@pytest.mark.parametrize("damage", ["model.onnx", "model.onnx.data"])
@pytest.mark.heavy
def test_damaged_onnx(damage, exported, run, source, tmp_path):
    for name, folder in (("onnx", ""), ("onnx hub", "onnx/")):
        directory = shutil.copytree(exported(name), tmp_path / name)
        path = directory / (folder + (damage.replace(".data", "_data") if folder else damage))
        path.write_bytes(path.read_bytes()[:100])
        status, out, err = run(directory, "--model", source(name))
        assert (status, out) == (2, "")
        assert "cannot be loaded, it may be damaged or cut off" in err


@pytest.mark.parametrize(("to", "library"), LIBRARY.items())
def test_a_missing_runtime(to, library, exported, run, home, monkeypatch, tmp_path):
    """Said before the model is loaded, with the command that installs it."""
    directory = as_format(exported("gguf f32"), to, tmp_path / to)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    status, out, err = run(directory, "--model", tmp_path / "nowhere")
    assert (status, out) == (2, "")
    assert err == f'selfpruner: {library} is not installed. Install it with: pip install "selfpruner-hub[{to}]"\n'


def as_format(directory, to, output, **options):
    """A copy of an export whose record has another format."""
    shutil.copytree(directory, output)
    record = json.loads((output / EXPORT_RECORD_FILE).read_text())
    record |= {"format": to, "options": {**OPTIONS[to], **options}}
    (output / EXPORT_RECORD_FILE).write_text(json.dumps(record))
    return output


def test_the_same_weights_under_another_configuration(exported, run, home, tmp_path):
    other = shutil.copytree(home / "tiny", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (other / "config.json").write_text(json.dumps(config))
    status, _, err = run(exported("gguf f32"), "--model", other)
    assert status == 2
    assert "is not the model that was exported: it has other configuration." in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="an NVIDIA GPU is here")
def test_tensorrt_without_a_gpu(exported, run, tmp_path):
    directory = as_format(exported("gguf f32"), "tensorrt", tmp_path / "trt", compute_capability="8.6")
    status, _, err = run(directory)
    assert status == 2
    assert "PyTorch sees no NVIDIA GPU here; the engine is for compute capability 8.6." in err


def test_tensorrt_is_compared(exported, verified, home, tmp_path, monkeypatch):
    """With PyTorch in the place of an engine, in an engine's context."""
    directory = as_format(exported("gguf f32"), "tensorrt", tmp_path / "trt", context=32)
    twin = load_model(str(home / "tiny"), device="cpu", dtype=torch.float32)[0]
    monkeypatch.setattr(causal_lm, "check_fits", lambda record: None)
    monkeypatch.setattr(causal_lm.TensorRtCausalLM, "from_pretrained", lambda directory: twin)
    status, told = verified(directory, "--model", home / "tiny")
    assert (status, told["files"][0]["file"], told["files"][0]["differs_at"]) == (0, "model.engine", None)
    status, told = verified(directory, "--model", home / "tiny", "--new-tokens", 30)
    assert status == 2
    assert "more than the 32 that the export takes." in told["error"]


@pytest.mark.gpu
@pytest.mark.heavy
def test_tensorrt_on_a_gpu(home, verified):
    """An engine for the GPU of this machine."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    model, tokenizer = load_model(str(home / "tiny"), device="cpu", dtype=torch.float32)
    export_model(model, tokenizer, "tensorrt", home / "trt", name="tiny", context=64)
    status, told = verified(home / "trt")
    assert status == 0
    assert told["files"][0]["difference"] > 0
