"""Tokenizers in GGUF files: llama.cpp reads text as the tokenizers themselves do, or the export is refused."""

from __future__ import annotations

import copy
import json

import pytest
from gguf import GGUFReader, TokenType
from support.tiny import tiny_model
from support.trained import KINDS, VOCABULARY, trained_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from exporters.to_gguf.llama_cpp import PROBE, LlamaCpp
from exporters.to_gguf.tokenizer import converted_fields, copied_fields
from exporters.to_gguf.writer import write
from selfpruner_hub.errors import ModelError, UserError

TEXTS = (
    PROBE,
    "Hello  world\n\n\n  x",
    "I'll they'RE 12345678 3.14!!! ...",
    "a",
    " leading",
    "日本語 텍스트 🙂🙂",
    "\t\ttabs\r\nand\r\n\r\nlines   ",
    "camelCaseHTTPServer foo_bar",
    "don’t “quote”—dash…",
    "</s> <s>",
)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """(kind, tokenizer, a GGUF file with it)."""
    pytest.importorskip("xllamacpp")
    tokenizer = trained_tokenizer(request.param)
    staging = tmp_path_factory.mktemp("gguf")
    # Three rows more than the tokenizer has tokens, as padded embeddings have.
    write(tiny_model("llama-mha-tied", vocab_size=len(tokenizer) + 3), tokenizer, staging)
    return request.param, tokenizer, staging / "model-f16.gguf"


def test_llama_cpp_reads_the_same_tokens(case):
    kind, tokenizer, path = case
    run = LlamaCpp(path, 64)
    # Before a text that starts with a space, Metaspace adds none; SentencePiece and llama.cpp do.
    texts = [t for t in TEXTS if kind != "sentencepiece-metaspace" or t not in (" leading", "</s> <s>")]
    assert [run.tokenize(text) for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    assert len(texts) > 7


def test_white_space_after_special_tokens_is_dropped_where_the_tokenizer_does(tmp_path):
    """Phi-3's chat template ends a turn with a line break that no token is made of."""
    pytest.importorskip("xllamacpp")
    tokenizer, texts = trained_tokenizer("sentencepiece"), ("<|user|>\nhello", "<|user|> \n a<|user|>b</s>\n c<s>\nd")
    stripping = {name: AddedToken(name, rstrip=True, special=True, normalized=False) for name in ("</s>", "<|user|>")}
    tokenizer.add_tokens([*stripping.values()], special_tokens=True)
    with pytest.raises(UserError, match="Tokenizers that drop white space after some tokens are not known to agree"):
        converted_fields(tokenizer, len(tokenizer))  # llama.cpp asks Phi-3's for this one
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)], special_tokens=True)
    model, source = tiny_model("llama-mha-tied", vocab_size=len(tokenizer)), tmp_path / "model-f16.gguf"
    write(model, tokenizer, tmp_path)
    write(model, None, tmp_path, dtype="f32", tokenizer_from=str(source))
    for path in (source, tmp_path / "model-f32.gguf"):
        run = LlamaCpp(path, 64)
        assert [run.tokenize(text) for text in texts] == [tokenizer(text)["input_ids"] for text in texts]


def test_special_tokens_are_the_tokenizers_own(case):
    """Each by its own name: llama.cpp ends a text at EOS, and puts BOS before it."""
    _, tokenizer, path = case
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    for name, token in (("bos", "<s>"), ("eos", "</s>"), ("unknown", "<unk>"), ("padding", "</s>")):
        assert tokens[fields[f"tokenizer.ggml.{name}_token_id"]] == token
    assert fields["tokenizer.ggml.add_bos_token"]
    assert not fields["tokenizer.ggml.add_eos_token"]


def test_a_chat_template_goes_along():
    tokenizer = trained_tokenizer()
    key = "tokenizer.chat_template"
    assert key not in {name for name, *_ in converted_fields(tokenizer, VOCABULARY)}
    template = "{{ messages[0]['content'] }}"
    for one_or_more in (template, {"default": template, "tool_use": "another"}):
        tokenizer.chat_template = one_or_more
        fields = {name: value for name, value, *_ in converted_fields(tokenizer, VOCABULARY)}
        assert fields[key] == template


@pytest.mark.parametrize("kind", ["gpt-2", "sentencepiece"])
def test_special_tokens_are_no_plain_text_and_bos_is_added_where_the_tokenizer_adds_it(kind):
    tokenizer = trained_tokenizer(kind)
    fields = {name: value for name, value, *_ in converted_fields(tokenizer, VOCABULARY)}
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert types["<s>"] == types["</s>"] == TokenType.CONTROL
    assert types["a"] == TokenType.NORMAL
    assert fields["tokenizer.ggml.add_bos_token"]
    fields = {name: value for name, value, *_ in converted_fields(_without(tokenizer, post_processor=None), VOCABULARY)}
    assert not fields["tokenizer.ggml.add_bos_token"]


def test_earlier_merges_have_higher_scores():
    tokenizer = trained_tokenizer("sentencepiece")
    fields = {name: value for name, value, *_ in converted_fields(tokenizer, VOCABULARY)}
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    merged = [scores["".join(pair)] for pair in pairs]
    assert merged == sorted(merged, reverse=True)
    assert merged[-1] < merged[0]
    assert scores["a"] < merged[-1]


def test_a_copy_equals_its_source(case):
    _, tokenizer, path = case
    copied = copied_fields(path, len(tokenizer) + 3)
    assert sorted(map(str, copied)) == sorted(map(str, converted_fields(tokenizer, len(tokenizer) + 3)))


def test_a_copy_in_another_file(case, tmp_path):
    _, tokenizer, path = case
    model = tiny_model("llama-mha-tied", vocab_size=len(tokenizer) + 3)
    write(model, None, tmp_path, dtype="f32", tokenizer_from=str(path))
    fields = [
        {name: field.contents() for name, field in GGUFReader(file).fields.items() if name.startswith("tokenizer.")}
        for file in (path, tmp_path / "model-f32.gguf")
    ]
    assert fields[0] == fields[1]
    assert len(fields[0]) > 6


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for content in (b"", b"GGUF", b"not at all a GGUF file " * 20):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="not a readable GGUF file"):
            copied_fields(path, 448)
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        copied_fields(tmp_path / "none.gguf", 448)


def test_a_tokenizer_of_another_size_is_refused(case):
    _, tokenizer, path = case
    with pytest.raises(ModelError, match=f"has {len(tokenizer) + 3} tokens; the model has 7"):
        copied_fields(path, 7)
    with pytest.raises(UserError, match=f"has {len(tokenizer)} tokens, the model 7"):
        converted_fields(tokenizer, 7)


def _without(tokenizer: PreTrainedTokenizerFast, **changes) -> PreTrainedTokenizerFast:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, change in changes.items():
        (state if key in state else state["model"])[key] = change
    changed = copy.copy(tokenizer)
    changed._tokenizer = Tokenizer.from_str(json.dumps(state))
    return changed


def test_tokenizers_that_llama_cpp_does_not_know_are_refused():
    byte_level, sentencepiece = trained_tokenizer("gpt-2"), trained_tokenizer("sentencepiece")
    lower = {"type": "Lowercase"}
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)])))
    split = json.loads(pre_tokenizers.Whitespace().__getstate__())
    for tokenizer in (
        unigram,
        _without(byte_level, pre_tokenizer=split),
        _without(byte_level, ignore_merges=True),
        _without(byte_level, merges=[]),
        _without(byte_level, normalizer=lower),
        _without(sentencepiece, normalizer=lower),
        _without(sentencepiece, pre_tokenizer=split),
    ):
        with pytest.raises(UserError, match="not known to agree with llama.cpp's.*tokenizer_from"):
            converted_fields(tokenizer, 512)
