"""Small real tokenizers, one of each kind that llama.cpp knows: trained on a little text, in milliseconds."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, normalizers, processors, trainers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split
from transformers import PreTrainedTokenizerFast

from exporters.to_gguf.tokenizer import PRE_TOKENIZERS

TEXT = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun. It's what they'd do; we'll see.",
    "In 1984 and 2024 they counted 31415 foxes, 271828 dogs and 10 cats: 3.14 % more than in 1999.",
    "def quick(fox):\n    return fox.jumps[0] != dog  # the lazy one\n\n\n\tif x == 10:\r\n\t\tpass",
    "Überraschung für naïve cafés; Привет, мир! 漢字とかな 한국어 🚀🙂",
] * 4
KINDS = (*PRE_TOKENIZERS.values(), "sentencepiece", "sentencepiece-metaspace")
VOCABULARY = 448
SPECIAL = ["<unk>", "<s>", "</s>"]


def trained_tokenizer(kind: str = "gpt-2") -> PreTrainedTokenizerFast:
    """A tokenizer of at most `VOCABULARY` tokens that puts `<s>` before a text, as Llama's do."""
    tokenizer = _sentencepiece(kind) if kind.startswith("sentencepiece") else _byte_level(kind)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _byte_level(kind: str) -> Tokenizer:
    (patterns, ignore_merges), _ = next(item for item in PRE_TOKENIZERS.items() if item[1] == kind)
    if kind in ("gpt-2", "smollm"):
        steps = [ByteLevel(add_prefix_space=False)]
        if kind == "smollm":
            steps.insert(0, Digits(individual_digits=True))
    else:
        steps = [Split(Regex(patterns[0]), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, _trainer(VOCABULARY, initial_alphabet=ByteLevel.alphabet()))
    return tokenizer


def _sentencepiece(kind: str) -> Tokenizer:
    """Llama 2's kind: no split at spaces, unknown characters as bytes."""
    trainee = Tokenizer(BPE(unk_token="<unk>"))
    trainee.pre_tokenizer = Metaspace(prepend_scheme="first")
    trainee.train_from_iterator(TEXT, _trainer(VOCABULARY - 256))
    learned = json.loads(trainee.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *list(learned["vocab"])[len(SPECIAL) :]]
    model = BPE(
        {token: index for index, token in enumerate(tokens)},
        [tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    if kind == "sentencepiece":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _trainer(size: int, **kwargs: object) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False, **kwargs)
