"""Tiny random models of every supported architecture: small enough to build in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.budget import ParameterBudget, Rates
from selfpruner_hub.pruning.importance import LayerOrder
from selfpruner_hub.pruning.slicing import Slicer, slice_model

GQA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_8 = {**GQA, "head_dim": 8}  # head_dim x heads is not hidden_size, as in Qwen3 and Gemma

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GQA, attention_bias=True),
    "llama-mha-tied": LlamaConfig(**{**GQA, "num_key_value_heads": 8}, tie_word_embeddings=True),
    "mistral": MistralConfig(**GQA, sliding_window=16),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**HEAD_8),
    "gemma": GemmaConfig(**HEAD_8),
    "gemma2": Gemma2Config(**HEAD_8, sliding_window=16),
    "gemma3": Gemma3TextConfig(**HEAD_8, sliding_window=16, sliding_window_pattern=2),
    "phi3": Phi3Config(**GQA),
}
"""One configuration per row of the architecture table, and MHA with tied embeddings."""


def tiny_model(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Build the model `name` of `CONFIGS` with random weights, biases included, far enough from zero to matter."""
    torch.manual_seed(seed)
    config = CONFIGS[name]
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](type(config).from_dict({**config.to_dict(), **changes})).eval()
    for key, parameter in model.named_parameters():
        if "norm" not in key:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tiny_pruned(name: str, **changes: object) -> PreTrainedModel:
    """Cut the model `name` of `CONFIGS` as `uneven` does."""
    return uneven(tiny_model(name, **changes))


def uneven(dense: PreTrainedModel) -> PreTrainedModel:
    """Cut a tiny model so that every layer differs, in attention and FFN, and one is whole; no repair."""
    shape = shape_of(dense.config)
    order = [
        LayerOrder(torch.arange(w.num_key_value_heads), torch.arange(w.intermediate_size)) for w in shape.dense.layers
    ]
    plan = ParameterBudget(shape, 0.3).project(Rates((0.0, 0.5, 0.25, 0.6), (0.0, 0.3, 0.5, 0.2)))
    return slice_model(Slicer(dense, order, None), plan)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for the 128 tokens of the tiny models: every ASCII character is a token."""
    alphabet = bytes_to_unicode()
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{alphabet[i]: i for i in range(3, 128)}}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def save_tiny(name: str, directory: Path) -> Path:
    """Save a tiny dense model with its tokenizer."""
    tiny_model(name).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
