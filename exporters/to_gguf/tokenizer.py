"""The tokenizer of a GGUF file: copied from another GGUF file, or converted from a transformers tokenizer.

llama.cpp has its own tokenizers and knows pre-tokenizers by name only. So a tokenizer is converted only if it is one of
those that were compared with llama.cpp's; others are refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, Keys, TokenType
from transformers import PreTrainedTokenizerBase

from selfpruner_hub.errors import ModelError, UserError

TokenizerFields = list[tuple[str, Any, GGUFValueType, GGUFValueType | None]]
"""Fields of a GGUF file: key, value, type, and the element type of an array."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Pattern that `ByteLevel(use_regex=True)` splits by."""
_DIGITS = "digits"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3.replace("{1,3}", ""),), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
"""llama.cpp's name of a pre-tokenizer, by (patterns that split the text, whether whole words are looked up first)."""
STRIPPING, KEEPING = "Phi-3", {"<unk>", "<s>", "<|endoftext|>"}
"""Name of a model that has llama.cpp drop white space after added tokens (`rstrip`), all but these, which must be there
as `</s>` must. No other field tells it so."""


def copied_fields(source: Path, vocabulary: int) -> TokenizerFields:
    """Copy the tokenizer of a GGUF file.

    Args:
        source: Path of the GGUF file.
        vocabulary: Number of rows of the model's embeddings, which the file's tokenizer must match.

    Returns:
        The `tokenizer.*` fields of the file, and the model's name where llama.cpp reads text by it.

    Raises:
        ModelError: The file is no GGUF file, has no tokenizer, or has one of another size.
    """
    try:
        reader = GGUFReader(source)
    except Exception as error:  # gguf raises various errors for a broken file
        raise ModelError(
            f"{str(source)!r} is not a readable GGUF file.", "Give the GGUF file of the parent."
        ) from error
    fields: TokenizerFields = [
        (name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.")
        or (name == Keys.General.NAME and any(each in field.contents().lower() for each in ("phi-3", "phi3")))
    ]
    tokens = next((len(value) for name, value, *_ in fields if name == Keys.Tokenizer.LIST), 0)
    if tokens != vocabulary:
        raise ModelError(
            f"The tokenizer of {str(source)!r} has {tokens} tokens; the model has {vocabulary}.",
            "Give the GGUF file of the model's own parent.",
        )
    return fields


def converted_fields(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> TokenizerFields:
    """Convert a BPE tokenizer to GGUF fields, byte-level (GPT-2, Llama 3, …) or SentencePiece (Llama 2).

    Args:
        tokenizer: Fast tokenizer.
        vocabulary: Number of rows of the model's embeddings; ids that the tokenizer lacks become unused tokens.

    Returns:
        The `tokenizer.*` fields, and the model's name where llama.cpp reads text by it.

    Raises:
        UserError: The tokenizer is none that was compared with llama.cpp's, or is larger than the vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    model = state["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _unknown(f"{model['type']} tokenizers")
    if not model["merges"]:  # the file's format has no empty lists
        raise _unknown("BPE tokenizers without merges")
    if len(tokenizer) > vocabulary:
        raise UserError(f"The tokenizer has {len(tokenizer)} tokens, the model {vocabulary}.", "Give the model's own.")
    tokens, types = _vocabulary(tokenizer, state, vocabulary)
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    fields: TokenizerFields = [
        (Keys.Tokenizer.LIST, tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
        (Keys.Tokenizer.TOKEN_TYPE, types, GGUFValueType.ARRAY, GGUFValueType.INT32),
    ]
    if model.get("byte_fallback"):
        scores = _scores(tokens, merges)
        fields += [
            (Keys.Tokenizer.MODEL, "llama", GGUFValueType.STRING, None),
            (Keys.Tokenizer.SCORES, scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
            (Keys.Tokenizer.ADD_PREFIX, _adds_space(state), GGUFValueType.BOOL, None),
        ]
    else:
        fields += [
            (Keys.Tokenizer.MODEL, "gpt2", GGUFValueType.STRING, None),
            (Keys.Tokenizer.PRE, _pre_tokenizer(state), GGUFValueType.STRING, None),
            (Keys.Tokenizer.MERGES, [" ".join(pair) for pair in merges], GGUFValueType.ARRAY, GGUFValueType.STRING),
        ]
    stripping = {entry["content"] for entry in state["added_tokens"] if entry["rstrip"]}
    if stripping:
        if stripping != {entry["content"] for entry in state["added_tokens"]} - KEEPING or not {*tokens} > KEEPING:
            raise _unknown("tokenizers that drop white space after some tokens")
        fields.append((Keys.General.NAME, STRIPPING, GGUFValueType.STRING, None))
    return fields + _special(tokenizer)


def _vocabulary(
    tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], vocabulary: int
) -> tuple[list[str], list[int]]:
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    ids = {index: token for token, index in tokenizer.get_vocab().items()}
    sentencepiece = bool(state["model"].get("byte_fallback"))
    tokens, types = [], []
    for index in range(vocabulary):
        token = ids.get(index)
        if token is None:
            kind, token = TokenType.UNUSED, f"[PAD{index}]"
        elif sentencepiece and index == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        elif sentencepiece and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Score each token by its place in the list of merges, earlier ones higher: llama.cpp merges the highest first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text, in either of transformers' two forms.

    The second form, `Metaspace`, adds no space to a text that starts with one; SentencePiece and llama.cpp do.
    """
    steps = _sequence(state["normalizer"], "normalizers")
    before = state["pre_tokenizer"] or {"type": None}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if before["type"] is None and steps == [{"type": "Prepend", "prepend": "▁"}, replace]:
        return True
    if before["type"] is None and steps == [replace]:
        return False
    if before["type"] == "Metaspace" and before["replacement"] == "▁" and not before["split"] and not steps:
        return before["prepend_scheme"] != "never"
    raise _unknown("SentencePiece tokenizers with this normalizer")


def _pre_tokenizer(state: dict[str, Any]) -> str:
    # Qwen's tokenizers normalise to NFC. llama.cpp's own converter leaves that out too: it changes few texts.
    normalizer = [step["type"] for step in _sequence(state["normalizer"], "normalizers")]
    parts: list[str] = [] if normalizer in ([], ["NFC"]) else normalizer
    for step in _sequence(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            parts += [_GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            parts.append(_DIGITS)
        elif step["type"] == "Split" and step["behavior"] in ("Isolated", "Removed"):
            parts.append(step["pattern"].get("Regex", "") + ("" if step["behavior"] == "Isolated" else "?"))
        else:
            parts.append(step["type"])
    name = PRE_TOKENIZERS.get((tuple(parts), bool(state["model"].get("ignore_merges"))))
    if name is None:
        raise _unknown("byte-level tokenizers that split text like this one")
    return name


def _sequence(step: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[members]) if step["type"] == "Sequence" else [step]


def _special(tokenizer: PreTrainedTokenizerBase) -> TokenizerFields:
    fields: TokenizerFields = [
        (key, int(index), GGUFValueType.UINT32, None)
        for key, index in (
            (Keys.Tokenizer.BOS_ID, tokenizer.bos_token_id),
            (Keys.Tokenizer.EOS_ID, tokenizer.eos_token_id),
            (Keys.Tokenizer.UNK_ID, tokenizer.unk_token_id),
            (Keys.Tokenizer.PAD_ID, tokenizer.pad_token_id),
        )
        if index is not None
    ]
    ids = tokenizer("a")["input_ids"]  # shows what the post-processor adds, whatever its type
    fields.append((Keys.Tokenizer.ADD_BOS, ids[0] == tokenizer.bos_token_id, GGUFValueType.BOOL, None))
    fields.append((Keys.Tokenizer.ADD_EOS, ids[-1] == tokenizer.eos_token_id, GGUFValueType.BOOL, None))
    templates = tokenizer.chat_template
    if template := templates.get("default") if isinstance(templates, dict) else templates:
        fields.append((Keys.Tokenizer.CHAT_TEMPLATE, template, GGUFValueType.STRING, None))
    return fields


def _unknown(what: str) -> UserError:
    return UserError(
        f"{what[0].upper()}{what[1:]} are not known to agree with llama.cpp's.",
        "Give the parent's GGUF file as tokenizer_from, or export to onnx.",
    )
