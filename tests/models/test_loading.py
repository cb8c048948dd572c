"""Loading: whatever is wrong with a model is one clear line with a remedy, and found out as early as it can be."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from support.tiny import CONFIGS, save_tiny, tiny_model, uneven
from support.trained import VOCABULARY, trained_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig

from exporters.to_gguf.writer import write
from selfpruner_hub.errors import ModelError, SavedModelError, UnsupportedArchitectureError, UserError
from selfpruner_hub.models import loading
from selfpruner_hub.models.architectures import ARCHITECTURES
from selfpruner_hub.models.loading import explain, load_model, resolve_directory
from selfpruner_hub.storage import gguf_files
from selfpruner_hub.storage.offload import DiskStore

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "intact")


@pytest.fixture
def model(intact, tmp_path):
    """A copy of an intact model, to be damaged."""
    return shutil.copytree(intact, tmp_path / "model")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/tmp/outside.safetensors"])
@pytest.mark.parametrize("offload", [False, True])
def test_an_index_that_names_files_elsewhere(offload, file, model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "outside.safetensors"), file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    store = {"store": DiskStore(tmp_path)} if offload else {}
    assert f"names weights outside of the model: '{file}'" in refusal(model, SavedModelError, **store)


def refusal(name, error=ModelError, **kwargs):
    """The message of the refusal to load `name`: one line that ends with a remedy."""
    with pytest.raises(error) as caught:
        load_model(str(name), **kwargs)
    assert_clear(caught.value)
    return str(caught.value)


def assert_clear(error):
    assert "\n" not in error.message + error.hint
    assert error.message.endswith(".")
    assert error.hint


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(directory, change):
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_an_intact_model_comes_ready_for_use(intact):
    model, tokenizer = load_model(str(intact), dtype=torch.bfloat16)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert tokenizer("ab")["input_ids"] == [97, 98]


def test_a_model_without_a_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert load_model(str(model))[1] is None


def test_a_gguf_file_is_read_once(tmp_path, monkeypatch):
    model, read = tiny_model("llama-mha-tied", vocab_size=VOCABULARY), []
    write(model, trained_tokenizer(), tmp_path, dtype="f32")
    reader = gguf_files._Reader
    monkeypatch.setattr(gguf_files, "_Reader", lambda path: read.append(reader(path)) or read[-1])
    for times in (1, 2):
        loaded, tokenizer = load_model(str(tmp_path), gguf_file="model-f32.gguf", dtype=torch.float32)
        assert len(read) == times  # nothing is kept from one model to the next
    assert not isinstance(read[0].fields["tokenizer.ggml.tokens"].parts[-1], np.memmap)  # which is slow to slice
    assert tokenizer("the fox")["input_ids"] == trained_tokenizer()("the fox")["input_ids"]
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_an_unsupported_architecture_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    message = refusal(tmp_path / "gpt2", UnsupportedArchitectureError)
    assert "'gpt2'" in message
    assert all(model_type in message for model_type in ARCHITECTURES)


def test_an_unknown_architecture_names_the_known_ones(model):
    change_config(model, model_type="brandnew")
    message = refusal(model, UnsupportedArchitectureError)
    assert all(model_type in message for model_type in ARCHITECTURES)


def test_custom_code_is_neither_run_nor_asked_for(model, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (model / "custom.py").write_text("raise SystemExit('custom code was run')")
    change_config(model, model_type="brandnew", auto_map={"AutoConfig": "custom.Config"})
    assert "custom code" in refusal(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, model):
    def spoil(weights):
        weights[WEIGHT][3, 5] = value

    change_weights(model, spoil)
    assert f"not finite (first in {WEIGHT})" in refusal(model)


def test_weights_that_cannot_tell_whether_they_are_finite(model, monkeypatch):
    """Those that torchao has quantised."""

    def refuse(_):
        raise NotImplementedError("Int8Tensor dispatch: attempting to run unimplemented operator")

    monkeypatch.setattr(torch.nn.Parameter, "isfinite", refuse)
    assert load_model(str(model))[0].num_parameters() > 0


def test_weights_that_a_device_map_leaves_on_disk(intact, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    loaded, _ = load_model(str(intact), device_map=places, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in loaded.parameters())


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_weights(share, model):
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "damaged or cut off" in refusal(model)


def test_a_missing_tensor_is_not_made_up(model):
    change_weights(model, lambda weights: weights.pop(WEIGHT))
    assert f"lack {WEIGHT}" in refusal(model)


@pytest.mark.parametrize("on_disk", [False, True])
def test_weights_decide_whether_the_head_is_tied(model, on_disk, tmp_path):
    """A cut model would take the embeddings for its head where the configuration said so."""
    wanted = load_file(model / "model.safetensors")["lm_head.weight"]
    change_config(model, tie_word_embeddings=True)
    loaded, _ = load_model(str(model), **({"store": DiskStore(tmp_path / "store")} if on_disk else {}))
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(uneven(loaded).lm_head.weight, wanted)


def test_a_tensor_of_another_shape(model):
    change_weights(model, lambda weights: weights.update({WEIGHT: weights[WEIGHT][:40].clone()}))
    refusal(model)


def test_a_directory_without_weights(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path / "bare")
    assert "model.safetensors" in refusal(tmp_path / "bare")


def test_a_directory_without_a_model(tmp_path):
    assert "config.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_configuration_of_no_model(text, model):
    (model / "config.json").write_text(text)
    assert "config.json is missing, or names no model_type" in refusal(model)


@pytest.mark.parametrize("layers", [2**62, 1e308])
def test_more_layers_than_any_model_has(layers, model):
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "num_hidden_layers": layers}))
    assert "layers by its config.json" in refusal(model)


def test_only_safetensors_are_offloaded(model, tmp_path):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert load_model(str(model))[0].num_parameters() > 0
    message = refusal(model, store=DiskStore(tmp_path / "store"))
    assert "has no safetensors, which offloading needs. Load it without, and save it first." in message


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_a_damaged_configuration(text, model):
    (model / "config.json").write_text(text)
    assert "config" in refusal(model)


def test_a_dtype_that_torch_does_not_know(intact):
    for dtype in ("float13", "int8", "torch"):
        message = refusal(intact, UserError, dtype=dtype)
        assert message == f"A model cannot be loaded in dtype {dtype!r}. Choose auto, float32, bfloat16 or float16."


@pytest.mark.parametrize("name", ["/no/such/directory", "no-such-directory", "example/no-such-model"])
def test_a_model_that_is_nowhere_or_out_of_reach(name):
    assert "Cannot find" in refusal(name)


def hub_error(kind, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nAccess is restricted.", response=response)


HUB_ERRORS = [
    (hub_error(GatedRepoError, 403), "is gated", "HF_TOKEN"),
    (hub_error(RepositoryNotFoundError, 401), "not on the Hub", "HF_TOKEN"),
    (hub_error(RevisionNotFoundError, 404), "not on the Hub", "Check the name"),
]


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize(("error", "said", "remedy"), HUB_ERRORS, ids=lambda value: type(value).__name__)
def test_errors_of_the_hub(error, said, remedy, wrapped, monkeypatch):
    def fail(*_, **__):
        if wrapped:
            raise OSError("You are trying to access\nsomething.") from error
        raise error

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", fail)
    message = refusal("example/model")
    assert said in message
    assert remedy in message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("\nLlama requires the PyTorch library.\nInstall it.\n"), "Llama requires the PyTorch library."),
        (OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection."), "out of reach"),
        (RuntimeError(), "Cannot find"),
    ],
    ids=repr,
)
def test_other_errors_are_one_line(error, said):
    explained = explain("example/model", error)
    assert_clear(explained)
    assert said in explained.message


def test_a_local_error_without_words_is_called_by_its_kind(tmp_path):
    assert "RuntimeError" in explain(str(tmp_path), RuntimeError()).message


def test_a_local_directory_is_itself(tmp_path):
    assert resolve_directory(str(tmp_path), revision="ignored") == tmp_path


def test_a_repository_is_its_snapshot(monkeypatch):
    monkeypatch.setattr(loading, "snapshot_download", lambda name, **kwargs: f"/cache/{name}/{sorted(kwargs.items())}")
    found = resolve_directory("me/model", revision="main", dtype="auto")
    ignored = ["plots/*", "onnx/*", "tensorrt/*", "openvino/*", "gguf/*"]
    assert found == Path(f"/cache/me/model/[('ignore_patterns', {ignored}), ('revision', 'main')]")
    found = resolve_directory("me/model", "onnx", revision="main")
    assert found == Path("/cache/me/model/[('allow_patterns', 'onnx/*'), ('revision', 'main')]/onnx")


def test_neither_a_directory_nor_a_repository(tmp_path):
    for name in ("me/no-such-model", str(tmp_path / "nothing")):
        with pytest.raises(ModelError, match="Cannot find") as caught:
            resolve_directory(name)
        assert caught.value.hint
        assert "\n" not in str(caught.value)
