"""The tokenizer of a model: none where there are no files of one, and an error with its cause where they are broken."""

import json

import pytest
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.storage import tokenizer_files
from selfpruner_hub.storage.layout import TOKENIZER
from selfpruner_hub.storage.tokenizer_files import load_tokenizer


@pytest.fixture
def saved(tmp_path):
    """A directory with the configuration of a Qwen2, for which transformers makes empty tokenizers, and a tokenizer."""
    tiny_model("qwen2").config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_an_intact_tokenizer(saved):
    assert load_tokenizer(str(saved))("ab")["input_ids"] == [97, 98]


def test_no_files_of_one(saved):
    for name in TOKENIZER:
        (saved / name).unlink(missing_ok=True)
    assert load_tokenizer(str(saved)) is None


@pytest.mark.parametrize("text", ["", "{}", "{", "[" * 100_000], ids=["empty", "object", "cut off", "deep"])
def test_a_damaged_file_is_named_with_its_cause(text, saved):
    (saved / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="The tokenizer of .* cannot be loaded: .*Error") as caught:
        load_tokenizer(str(saved))
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_no_vocabulary_is_no_tokenizer(saved):
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="it has no vocabulary"):
        load_tokenizer(str(saved))


def test_a_tokenizer_whose_library_is_missing_is_not_taken_for_none(saved):
    """Its vocabulary is a file of SentencePiece or tiktoken, which neither reads."""
    (saved / "tokenizer.json").unlink()
    (saved / "tokenizer.model").write_bytes(b"junk")
    config = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(saved))


def test_a_model_with_a_broken_tokenizer_is_refused(saved):
    tiny_model("qwen2").save_pretrained(saved)
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="The tokenizer of"):
        load_model(str(saved), device="cpu")


@pytest.mark.parametrize(
    ("names", "kind"), [(["config.json"], None), (["config.json", "vocab.json"], ModelError), (OSError(), ModelError)]
)
def test_of_a_repository_the_hub_says_whether_it_has_one(names, kind, monkeypatch):
    """Where it is out of reach, nobody knows, and the tokenizer is not taken for none."""

    def list_repo_files(name, revision, token):
        assert (name, revision) == ("tests/model", "v1")
        if isinstance(names, OSError):
            raise names
        return names

    monkeypatch.setattr(tokenizer_files, "list_repo_files", list_repo_files)
    if kind is None:
        assert load_tokenizer("tests/model", revision="v1") is None
        return
    with pytest.raises(kind, match="The tokenizer of 'tests/model' cannot be loaded"):
        load_tokenizer("tests/model", revision="v1")
