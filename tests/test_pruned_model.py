"""What a saved model brings besides its weights: a tokenizer that loads anywhere, and a card that fits it."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from dataclasses import replace

import pytest
import torch
from support.chatting import chat_tokenizer
from support.checks import check_tokenizers_without_package
from support.tiny import tiny_model, tiny_tokenizer, uneven
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from selfpruner_hub import AutoPruner, pruned_model
from selfpruner_hub.errors import OutputError, SavedModelError, UserError
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.storage.model_record import Metric, read_record

IDS = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))


def test_the_tokenizer_and_the_card(saved_model, tmp_path):
    pruned, made = PrunedModel.from_pretrained(saved_model), {"base": tiny_tokenizer(), "chat": chat_tokenizer()}
    for name, tokenizer in made.items():
        pruned.tokenizer = tokenizer
        pruned.save_pretrained(tmp_path / name)
        assert ("apply_chat_template" in (tmp_path / name / "README.md").read_text()) == (name == "chat")
    check_tokenizers_without_package({tmp_path / name: tokenizer for name, tokenizer in made.items()}, tmp_path)


def test_files_of_an_earlier_model_go_and_the_users_own_stay(saved_model):
    pruned = PrunedModel.from_pretrained(saved_model)
    bare = {path.name for path in saved_model.iterdir()} - {"tokenizer.json", "tokenizer_config.json"}
    own = {"notes.txt", "vocabulary.txt", "onnx"}
    for name in own - {"onnx"}:
        (saved_model / name).write_text("mine")
    (saved_model / "onnx").mkdir()
    pruned.tokenizer = chat_tokenizer()
    pruned.tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    pruned.save_pretrained(saved_model)
    assert (saved_model / "additional_chat_templates" / "tools.jinja").is_file()
    (saved_model / "vocab.txt").write_text("of a tokenizer of another kind")
    pruned.tokenizer = tiny_tokenizer()
    pruned.save_pretrained(saved_model)
    assert not PrunedModel.from_pretrained(saved_model).tokenizer.chat_template
    pruned.tokenizer = None
    pruned.save_pretrained(saved_model)
    assert {path.name for path in saved_model.iterdir()} == bare | own
    assert PrunedModel.from_pretrained(saved_model).tokenizer is None


def test_a_dense_model_is_replaced_only_if_asked(saved_model, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    before = (tmp_path / "dense" / "config.json").read_bytes()
    with pytest.raises(OutputError, match="holds another model"):
        pruned.save_pretrained(tmp_path / "dense")
    for output in (tmp_path / "dense", saved_model):  # the model itself is no export either
        with pytest.raises(OutputError, match="holds another model"):
            pruned.export("gguf", output)
    with pytest.raises(OutputError, match="no name"):
        pruned.save_pretrained("")
    with pytest.raises(OutputError, match="no name"):
        pruned.export("gguf", "")
    assert (tmp_path / "dense" / "config.json").read_bytes() == before
    pruned.save_pretrained(tmp_path / "dense", overwrite=True)
    assert PrunedModel.from_pretrained(tmp_path / "dense").plan == pruned.plan


def test_arguments_that_have_no_use_are_named(saved_model, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model)
    for act in (
        lambda: pruned.push_to_hub("me/model", tags=["mine"]),
        lambda: pruned.save_pretrained(tmp_path / "new", push_to_hub=True, tags=["mine"]),
        lambda: pruned.save_pretrained(tmp_path / "new", tags=["mine"]),
    ):
        with pytest.raises(UserError, match="has no use for 'tags'"):
            act()
    assert not (tmp_path / "new").exists()


def test_a_journal_that_is_no_text_is_damaged(saved_model):
    (saved_model / "search.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SavedModelError, match="damaged"):
        PrunedModel.from_pretrained(saved_model)


@pytest.mark.parametrize("name", [None, "", 5])
def test_a_model_needs_a_name(name):
    with pytest.raises(UserError, match="name must be the name of the model"):
        AutoPruner(tiny_model("llama"), tiny_tokenizer(), name)


def test_it_is_used_as_a_transformers_model_is(saved_model):
    pruned = PrunedModel.from_pretrained(saved_model)
    assert torch.equal(pruned(IDS).logits, pruned.model(IDS).logits)
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(pruned.generate(IDS, **given), pruned.model.generate(IDS, **given))
    assert pruned.device == torch.device("cpu")
    assert pruned.to(torch.bfloat16) is pruned
    assert pruned.dtype == pruned.model.dtype == torch.bfloat16
    assert pruned.config is pruned.model.config
    with pytest.raises(AttributeError):
        pruned.no_such_attribute  # noqa: B018
    for other in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):  # noqa: S301
        assert other.plan == pruned.plan


def test_a_pipeline_takes_it(saved_model):
    pruned = PrunedModel.from_pretrained(saved_model)
    given = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    texts = [
        pipeline("text-generation", model=model, tokenizer=pruned.tokenizer)("The quick", **given)[0]["generated_text"]
        for model in (pruned, pruned.model)
    ]
    assert texts[0] == texts[1]
    assert len(pruned.tokenizer(texts[0])["input_ids"])


def test_trained_weights_have_no_figures_of_the_old_ones(saved_model, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model)
    pruned.report = replace(pruned.report, metrics={"perplexity": Metric(3.0, None, "once")})
    trained = copy.deepcopy(pruned.model)
    with torch.no_grad():
        trained.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    made = pruned.retrained(trained, "one step by hand")
    assert pruned.report.metrics
    made.save_pretrained(tmp_path / "trained")
    again = PrunedModel.from_pretrained(tmp_path / "trained")
    assert torch.equal(again(IDS).logits, trained(IDS).logits)
    assert again.report.metrics == {}
    assert again.report.treatment == "and was then trained (one step by hand)"
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "Then it was trained: one step by hand." in card
    assert "not retrained" not in card
    assert "It was not retrained." in (saved_model / "README.md").read_text()


@pytest.mark.parametrize(
    ("spoil", "how", "said"),
    [
        (lambda model: model, " ", "in one line how"),
        (lambda model: model, "two\nlines", "in one line how"),
        (lambda model: tiny_model("llama"), "by hand", "other widths"),
        (lambda model: model.mul_(float("nan")), "by hand", "diverged: model.embed_tokens.weight is not finite"),
        (lambda model: model.adapt(), "by hand", "still has adapters"),
    ],
    ids=["no words", "lines", "widths", "diverged", "adapters"],
)
def test_what_is_no_trained_form_of_it_is_refused(spoil, how, said, saved_model):
    pruned = PrunedModel.from_pretrained(saved_model)
    model = copy.deepcopy(pruned.model)

    def spread(factor):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(factor)
        return model

    def adapt():  # as PEFT names what it wraps
        layer = model.model.layers[0].mlp
        layer.down_proj = torch.nn.ModuleDict({"base_layer": layer.down_proj})
        return model

    model.mul_, model.adapt = spread, adapt
    with pytest.raises(UserError, match=said):
        pruned.retrained(spoil(model), how)


UNSAID = "how is not recorded"


@pytest.mark.parametrize(
    ("change", "known", "training"),
    [
        (lambda model: model.model.norm.weight.data.mul_(1.01), None, UNSAID),
        (lambda model: model.model.norm.weight.data.mul_(1.01), "by hand", "by hand, then changed again"),
        (lambda model: model.to(torch.bfloat16), None, None),
        (lambda model: model.resize_token_embeddings(130), None, None),
        (lambda model: model, "by hand", "by hand"),
    ],
    ids=["changed", "changed again", "converted", "resized", "trained"],
)
def test_weights_that_were_changed_in_place_have_no_old_figures(change, known, training, saved_model, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model)
    if known:
        pruned = pruned.retrained(pruned.model, known)
    pruned.report = replace(pruned.report, metrics={"perplexity": Metric(3.0, None, "once")})
    change(pruned.model)
    for name in ("one", "two"):
        pruned.save_pretrained(tmp_path / name)
        record = read_record(tmp_path / name)
        assert record.method.get("training") == training
        assert bool(record.metrics) == (training == known)
        assert ("was not retrained" in (tmp_path / name / "README.md").read_text()) == (training is None)


def test_a_conversion_there_and_back_is_no_training(saved_model, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model).to(torch.bfloat16).to(torch.float32)
    pruned.save_pretrained(tmp_path / "again")
    assert "training" not in read_record(tmp_path / "again").method


CONVERSIONS = {
    "half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64,
    "cpu": torch.float32,
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_converted_model_is_the_one_that_is_loaded_in_that_dtype(name, saved_model):
    dtype = CONVERSIONS[name]
    pruned, loaded = (PrunedModel.from_pretrained(saved_model, dtype=kind) for kind in (torch.float32, dtype))
    assert getattr(pruned, name)() is pruned
    assert {parameter.dtype for parameter in pruned.model.parameters()} == {dtype}
    assert pruned.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(pruned(IDS).logits, loaded(IDS).logits)


def test_an_attribute_is_set_where_it_is_read(saved_model):
    pruned = PrunedModel.from_pretrained(saved_model)
    pruned.generation_config = GenerationConfig(max_new_tokens=3)
    assert pruned.model.generation_config.max_new_tokens == 3
    assert pruned.generate(IDS, do_sample=False, eos_token_id=None).shape[1] == IDS.shape[1] + 3
    pruned.tokenizer = None
    assert not hasattr(pruned.model, "tokenizer")


def test_generation_settings_are_not_those_of_the_dense_model():
    dense = tiny_model("llama")
    uneven(dense).generation_config.max_new_tokens = 3
    assert dense.generation_config.max_new_tokens != 3


def test_generation_settings_that_cannot_be_saved_are_one_line(saved_model, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model)
    pruned.generation_config.temperature = 0.5
    with pytest.raises(UserError, match="generation settings of the model cannot be saved: `temperature`"):
        pruned.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generation_settings_of_a_file_are_kept_as_they_are(tmp_path):
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    vicuna = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(vicuna))
    pruner = AutoPruner.from_pretrained(str(tmp_path / "dense"), device="cpu")
    texts = ["The quick brown fox jumps over the lazy dog. " * 40]
    pruner.prune(
        0.3, data=texts, window=32, calibration_tokens=512, fitness_tokens=128, fisher_tokens=128, evaluations=0,
        seeds=("uniform",), progress=False,
    ).save_pretrained(tmp_path / "out")  # fmt: skip
    again = PrunedModel.from_pretrained(tmp_path / "out", device="cpu")
    again.save_pretrained(tmp_path / "again")
    for name in ("out", "again"):
        saved = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert vicuna.items() <= saved.items()


def test_a_retrained_head_of_its_own_is_in_the_configuration(saved_model, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model)
    pruned.model.config.tie_word_embeddings = True  # as of a parent whose head was tied
    pruned.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_window_is_as_wide_as_the_model_reads(saved_model, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    pruned = PrunedModel.from_pretrained(saved_model)
    assert set(pruned.evaluate(str(tmp_path / "text.txt"))) == {"perplexity (128)"}
    with pytest.raises(UserError, match="at most 128 tokens, as many as the model was made to read; got 129"):
        pruned.evaluate(str(tmp_path / "text.txt"), window=129)


def test_what_it_measures_is_in_its_record(saved_model, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    pruned, dense = PrunedModel.from_pretrained(saved_model), tiny_model("llama", num_hidden_layers=2)
    found = pruned.evaluate(str(tmp_path / "text.txt"), window=16, windows=8, dense=dense)
    assert set(found) == {"perplexity (16)", "KL (16)"}
    alone = pruned.evaluate(str(tmp_path / "text.txt"), window=16, windows=8)
    assert alone["perplexity (16)"].value == found["perplexity (16)"].value
    theirs = PrunedModel(dense, pruned.tokenizer, pruned.report).evaluate(
        str(tmp_path / "text.txt"), window=16, windows=8
    )
    assert found["perplexity (16)"].dense == theirs["perplexity (16)"].value
    assert found["KL (16)"].dense is None
    pruned.save_pretrained(tmp_path / "again")
    assert read_record(tmp_path / "again").metrics["KL (16)"] == found["KL (16)"]


def test_weights_of_other_names_leave_with_the_model_that_they_were_of(saved_model):
    pruned = PrunedModel.from_pretrained(saved_model)
    (saved_model / "notes.txt").write_text("mine")
    before = pruned.model.state_dict()
    for size, shards in (("20KB", True), (None, False), ("20KB", True)):
        pruned.save_pretrained(saved_model, max_shard_size=size)
        index = saved_model / "model.safetensors.index.json"
        assert index.exists() == shards
        named = set(json.loads(index.read_text())["weight_map"].values()) if shards else {"model.safetensors"}
        assert {path.name for path in saved_model.glob("*.safetensors")} == named
        again = AutoModelForCausalLM.from_pretrained(saved_model).state_dict()
        assert all(torch.equal(value, before[key]) for key, value in again.items())
    assert (saved_model / "notes.txt").exists()


def test_arguments_of_publishing_reach_it(saved_model, tmp_path, monkeypatch):
    asked = []

    @functools.wraps(pruned_model.publish)
    def publish(directory, repo_id, **more):
        asked.append((repo_id, more))

    monkeypatch.setattr(pruned_model, "publish", publish)
    pruned = PrunedModel.from_pretrained(saved_model)
    message = {"commit_message": "Shrink it", "commit_description": "By a third.", "private": True, "token": True}
    pruned.push_to_hub("me/model", max_shard_size="20KB", **message)
    assert message.items() <= asked[0][1].items()
    pruned.save_pretrained(tmp_path / "named", push_to_hub=True, commit_message="Shrink it")
    assert asked[1] == ("named", {"commit_message": "Shrink it"})
    with pytest.raises(UserError, match="no use for 'commit_message'"):
        pruned.save_pretrained(tmp_path / "other", commit_message="Shrink it")
    pruned.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
