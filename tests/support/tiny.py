"""Tiny random models of every supported architecture: small enough to build in milliseconds."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    ArceeConfig,
    Cohere2Config,
    CohereConfig,
    CwmConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
    Starcoder2Config,
    VaultGemmaConfig,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from selfpruner_hub.models.architectures import architecture_of, decoder_layers, shape_of
from selfpruner_hub.plans.budget import Budget, Rates
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
MHA, MQA = {**GQA, "num_key_value_heads": 8}, {**HEAD_8, "num_key_value_heads": 1}
ALTERNATING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
SCALED = {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", **SCALED}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GQA, attention_bias=True),
    "llama-mha-tied": LlamaConfig(**MHA, tie_word_embeddings=True),
    "mistral": MistralConfig(**GQA, sliding_window=16),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**HEAD_8),
    "gemma": GemmaConfig(**HEAD_8),
    "gemma2": Gemma2Config(**HEAD_8, sliding_window=16),
    "gemma3": Gemma3TextConfig(**HEAD_8, sliding_window=16, sliding_window_pattern=2),
    "phi3": Phi3Config(**GQA),
    "arcee": ArceeConfig(**GQA, attention_bias=True, mlp_bias=True),
    "cohere": CohereConfig(**MHA, use_qk_norm=True, logit_scale=0.5),
    "cohere2": Cohere2Config(**GQA, **ALTERNATING, attention_bias=True, logit_scale=0.5),
    "cwm": CwmConfig(**HEAD_8, **ALTERNATING, rope_parameters=LLAMA3),
    "ernie4_5": Ernie4_5Config(**HEAD_8, use_bias=True),
    "exaone4": Exaone4Config(**HEAD_8, sliding_window=16, sliding_window_pattern=4),
    "gemma-mqa": GemmaConfig(**MQA),
    "glm": GlmConfig(**HEAD_8),
    "glm4": Glm4Config(**HEAD_8),
    "granite": GraniteConfig(
        **GQA, attention_bias=True, mlp_bias=True, embedding_multiplier=3.0, residual_multiplier=0.22,
        attention_multiplier=0.4, logits_scaling=2.0,
    ),
    "hunyuan": HunYuanDenseV1Config(**HEAD_8, attention_bias=True),
    "ministral": MinistralConfig(**HEAD_8, **ALTERNATING),
    "ministral3": Ministral3Config(**HEAD_8, rope_parameters={**YARN, "llama_4_scaling_beta": 0.1}),
    "olmo2": Olmo2Config(**MHA, attention_bias=True),
    "olmo3": Olmo3Config(**GQA, **ALTERNATING),
    "seed_oss": SeedOssConfig(**HEAD_8, attention_out_bias=True, mlp_bias=True),
    "smollm3": SmolLM3Config(**GQA),
    "starcoder2": Starcoder2Config(**GQA, sliding_window=16),
    "vaultgemma": VaultGemmaConfig(**HEAD_8, sliding_window=16, query_pre_attn_scalar=8),
}  # fmt: skip
"""At least one configuration per row of the architecture table; biases, sliding windows, multipliers, MHA and MQA."""

DISTINCT = (
    "llama", "llama-mha-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "cohere2", "granite",
    "olmo2", "starcoder2",
)  # fmt: skip
"""The names of `CONFIGS` that the package treats differently; what else is peculiar is inside transformers' layers."""


def tiny_model(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Build the model `name` of `CONFIGS` with random weights, biases included, far enough from zero to matter."""
    torch.manual_seed(seed)
    config = CONFIGS[name]
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](type(config).from_dict({**config.to_dict(), **changes})).eval()
    for key, parameter in model.named_parameters():
        if "norm" not in key or key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    for norm in architecture_of(config).norms:
        for layer in decoder_layers(model):
            torch.nn.init.normal_(layer.get_submodule(norm.path).weight, mean=1, std=0.2)
    return model


def surer(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """A copy whose logits, before any cap on them, are those of the model times the factor."""
    other = copy.deepcopy(model)
    norm, unit = other.get_decoder().norm, architecture_of(model.config).norm_unit
    norm.weight.data = factor * (norm.weight.data + unit) - unit
    if getattr(norm, "bias", None) is not None:
        norm.bias.data *= factor
    return other


def tiny_pruned(name: str, **changes: object) -> PreTrainedModel:
    """Cut the model `name` of `CONFIGS` as `uneven` does."""
    return uneven(tiny_model(name, **changes))


def shallow(name: str) -> PreTrainedModel:
    """The same with two layers, for what takes seconds a layer: one is whole, and they are of all kinds."""
    kinds = getattr(CONFIGS[name], "layer_types", None)
    return tiny_pruned(name, num_hidden_layers=2, **({"layer_types": kinds[:2]} if kinds else {}))


def uneven(dense: PreTrainedModel) -> PreTrainedModel:
    """Cut a tiny model so that every layer differs, in attention and FFN, and one is whole; no repair."""
    shape = shape_of(dense.config)
    rates = Rates((0.0, 0.5, 0.25, 0.6)[: shape.num_layers], (0.0, 0.3, 0.5, 0.2)[: shape.num_layers])
    plan = Budget(shape, 0.3).project(rates)
    return slice_model(Slicer(dense), plan)


def tiny_tokenizer(start: str = "") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for the 128 tokens of the tiny models: every ASCII character is a token.

    It puts the special tokens of `start`, such as `"<s>"`, before every text.
    """
    alphabet = bytes_to_unicode()
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{alphabet[i]: i for i in range(3, 128)}}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if start:
        special = [(token, vocabulary[token]) for token in start.split()]
        tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def save_tiny(name: str, directory: Path, **changes: object) -> Path:
    """Save a tiny dense model with its tokenizer."""
    tiny_model(name, **changes).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
