"""What is published of a saved model, and what is not."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file
from support.chatting import TEMPLATE, chat_tokenizer
from support.exports import export_record
from support.hub_server import check_yaml

from selfpruner_hub.cli import main
from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.hub.bundle import collect, is_ours
from selfpruner_hub.hub.card import render_card, save_metrics
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, Metric, read_record


def put_export(directory, name, record):
    """An export as `exporters` leaves it, as far as publishing looks at it."""
    folder = directory / name
    folder.mkdir()
    (folder / MODEL_RECORD_FILE).write_text(record.to_json())
    made = export_record(name, identity_of(load_model(str(directory), device="cpu")[0]))
    (folder / EXPORT_RECORD_FILE).write_text(made.to_json())
    (folder / "model.gguf").write_bytes(b"graph")
    return folder


def test_everything_of_the_model_and_nothing_else(saved_model):
    for name in ("notes.txt", ".env", "optimizer.pt", "NOTICE"):
        (saved_model / name).write_text("mine")
    (saved_model / "checkpoints").mkdir()
    (saved_model / "checkpoints" / "model.safetensors").write_text("mine")
    bundle = collect(saved_model)
    assert set(bundle.files) == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_selfpruned.py", "NOTICE"),
        *("search.jsonl", "selfpruner.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert set(bundle.pictures) == {"plots/search.png", "plots/population.png", "plots/rates.png"}
    assert all(content.startswith(b"\x89PNG") for content in bundle.pictures.values())
    assert bundle.exports == ()


def test_weights_that_are_cut_off_stay_at_home(saved_model):
    weights = saved_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SavedModelError, match=r"model\.safetensors is damaged or cut off"):
        collect(saved_model)


def test_a_model_without_one_of_its_shards_stays_at_home(saved_model):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (saved_model / "model.safetensors").rename(saved_model / names[0])
    index = {"weight_map": dict(zip(("first", "second"), names, strict=True))}
    (saved_model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SavedModelError, match=f"not a whole model: {names[1]} is missing"):
        collect(saved_model)
    weights = [*load_file(saved_model / names[0]).items()]
    for name, half in zip(names, (weights[::2], weights[1::2]), strict=True):
        save_file(dict(half), saved_model / name)
    assert set(names) <= set(collect(saved_model).weights)


def test_a_chat_template_is_published(saved_model):
    """Without it, what is loaded from the Hub cannot chat; the card says whether it can."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE}
    tokenizer.save_pretrained(saved_model)
    templates = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert all((saved_model / name).is_file() for name in templates)
    bundle = collect(saved_model)
    assert templates <= set(bundle.files)
    assert all(map(is_ours, templates))
    assert bundle.chat


def test_pictures_are_drawn_the_same_twice(saved_model):
    assert collect(saved_model).pictures == collect(saved_model).pictures


def test_a_model_without_a_journal_has_no_pictures(saved_model):
    (saved_model / "search.jsonl").write_text("")
    assert collect(saved_model).pictures == {}
    (saved_model / "search.jsonl").unlink()
    assert collect(saved_model).pictures == {}


def test_exports_of_this_model(saved_model):
    record = read_record(saved_model)
    (put_export(saved_model, "gguf", record) / ".cache").write_text("mine")
    measured = replace(record, metrics={"perplexity": Metric(12.5, 10.25, "later")})
    (saved_model / MODEL_RECORD_FILE).write_text(measured.to_json())  # what is measured later changes no weight
    bundle = collect(saved_model)
    assert bundle.exports == ("gguf",)
    assert {f"gguf/{name}" for name in (MODEL_RECORD_FILE, EXPORT_RECORD_FILE, "model.gguf")} == {
        name for name in bundle.files if "/" in name
    }


def test_an_export_of_another_model(saved_model, saved_models):
    put_export(saved_model, "onnx", read_record(saved_models / "second"))
    with pytest.raises(SavedModelError, match="an export of another model") as caught:
        collect(saved_model)
    assert "--with onnx" in caught.value.hint


@pytest.mark.parametrize("change", ["weights", "configuration"])
def test_an_export_of_other_weights_of_the_same_run(change, saved_model):
    """As after a second training that is described in the same words: the records are the same."""
    put_export(saved_model, "gguf", read_record(saved_model))
    assert collect(saved_model).exports == ("gguf",)
    if change == "weights":
        weights = load_file(saved_model / "model.safetensors")
        weights["lm_head.weight"][1, 1] += 1
        save_file(weights, saved_model / "model.safetensors")
    else:
        config = json.loads((saved_model / "config.json").read_text())
        (saved_model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.3}))
    record = replace(read_record(saved_model), weights="")  # as of an earlier version
    (saved_model / MODEL_RECORD_FILE).write_text(record.to_json())
    with pytest.raises(SavedModelError, match="an export of another model"):
        collect(saved_model)


def test_weights_that_were_changed_in_the_directory(saved_model, caplog):
    """As by a training that saves over the model: figures of the former weights are not those of the new ones."""
    record = read_record(saved_model)
    save_metrics(saved_model, {"perplexity": Metric(12.5, 10.0, "a.txt")})
    weights = load_file(saved_model / "model.safetensors")
    weights["lm_head.weight"][1, 1] += 1
    save_file(weights, saved_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SavedModelError, match="were changed after they were saved.*its method retrained"):
        collect(saved_model)
    loaded = PrunedModel.from_pretrained(saved_model)
    assert loaded.report.treatment == "and was then trained (how is not recorded)"
    assert not loaded.report.metrics
    assert "The weights were changed after pruning" in caplog.text
    made = save_metrics(saved_model, {"agreement": Metric(0.5, None, "b.txt")})
    assert [*made.metrics] == ["agreement"]
    assert made.weights != record.weights
    assert "without retraining" not in (saved_model / "README.md").read_text()
    assert collect(saved_model).record == made  # the figures are of these weights now
    loaded.save_pretrained(saved_model.with_name("again"))
    assert read_record(saved_model.with_name("again")).weights == made.weights


def test_an_export_to_another_format(saved_model):
    put_export(saved_model, "onnx", read_record(saved_model))
    shutil.move(saved_model / "onnx", saved_model / "gguf")
    with pytest.raises(SavedModelError, match="an export to onnx, not to gguf"):
        collect(saved_model)


def test_the_card_shows_the_pictures_that_are_published(saved_model):
    bundle = collect(saved_model)
    card = render_card(bundle.record, "me/tiny", pictures=list(bundle.pictures), chat=bundle.chat)
    assert check_yaml(card) == []
    assert set(re.findall(r"\]\((plots/[^)]+)\)", card)) == bundle.pictures.keys() - {"plots/population.png"}
    assert 'from_pretrained("me/tiny"' in card


def test_a_secret_in_the_record_stays_at_home(saved_model, monkeypatch, capsys):
    monkeypatch.setenv("MY_API_KEY", "planted-in-a-protocol")
    record = read_record(saved_model)
    metrics = {"perplexity": Metric(12.5, 10.25, "at planted-in-a-protocol")}
    (saved_model / MODEL_RECORD_FILE).write_text(replace(record, metrics=metrics).to_json())
    assert main(["push", str(saved_model), "me/tiny", "--quiet"]) == 2
    said = capsys.readouterr()
    assert "holds the value of MY_API_KEY; nothing was published" in said.err
    assert "planted-in-a-protocol" not in said.err


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("plots/anything.png", True),
        ("onnx/decode.onnx", True),
        ("README.md", False),  # always written anew
        ("LICENSE", False),
        ("onnx.md", False),
        ("adapter_model.safetensors", False),
        ("media/rates.png", False),
        ("model_fp8/model.safetensors", False),
        ("models/backup.safetensors", False),
        ("additional_chat_templates/tools.jinja", True),
    ],
)
def test_what_of_a_repository_is_ours(name, ours):
    assert is_ours(name) is ours
