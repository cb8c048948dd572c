"""Causal language models whose decoder layers differ in width.

This file imports torch and transformers only: it is copied beside the weights of every pruned model, so that
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` works without `selfpruner_hub`.

A decoder layer is the stock layer of its architecture, built with its own widths; no forward pass is rewritten.
The widths are in transformers' `per_layer_config` (`num_attention_heads`, `num_key_value_heads`,
`intermediate_size`), the dense values at the top level of the configuration.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class LayerConfig:
    """The configuration of one layer: its own widths; all other attributes are read from the model's configuration.

    They are read at each access, because a layer reads `_attn_implementation` at every call: a copy made before it is
    resolved would run without a causal mask, and a later copy would ignore `set_attn_implementation`.

    Args:
        config: Configuration of the whole model.
        **widths: Attributes that belong to this layer.
    """

    def __init__(self, config: PreTrainedConfig, **widths: int) -> None:
        self.__dict__.update(widths)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        """Read an attribute that is not the layer's own from the model's configuration."""
        if name.startswith("__") or "_config" not in self.__dict__:  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""The attributes that `per_layer_config` may override."""


def _homogeneous(config: PreTrainedConfig) -> PreTrainedConfig:
    """A shallow copy with only the dense values."""
    dense = copy.copy(config)
    dense.per_layer_config = None
    return dense


class SelfPrunedConfigMixin:
    """Validates a configuration whose layers differ: stock checks on the dense values, width checks on each layer."""

    def validate(self) -> None:
        """Raise `ValueError` unless every layer has whole groups of query heads and at least one channel."""
        super(SelfPrunedConfigMixin, _homogeneous(self)).validate()
        for index, layer in enumerate(self.per_layer_config):
            heads, groups, channels = (getattr(layer, name) for name in WIDTHS)
            if groups < 1 or channels < 1 or heads % groups:
                raise ValueError(
                    f"Layer {index} cannot have {heads} query heads, {groups} KV heads and {channels} FFN channels."
                )


class SelfPrunedMixin:
    """Builds the stock model around decoder layers of their own widths."""

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig) -> None:
        # The stock constructor would give every layer the dense widths, so let it build no layers.
        skeleton = _homogeneous(config)
        skeleton.num_hidden_layers = 0
        super().__init__(skeleton)
        config._attn_implementation_internal = skeleton._attn_implementation_internal
        for module in self.modules():
            if getattr(module, "config", None) is skeleton:
                module.config = config
        self.model.layers = nn.ModuleList(
            self.layer_class(LayerConfig(config, **{name: getattr(layer, name) for name in WIDTHS}), index)
            for index, layer in enumerate(config.per_layer_config)
        )
        self.post_init()


class SelfPrunedLlamaConfig(SelfPrunedConfigMixin, LlamaConfig):
    model_type = "selfpruned_llama"


class SelfPrunedLlamaForCausalLM(SelfPrunedMixin, LlamaForCausalLM):
    config_class = SelfPrunedLlamaConfig
    layer_class = LlamaDecoderLayer


class SelfPrunedMistralConfig(SelfPrunedConfigMixin, MistralConfig):
    model_type = "selfpruned_mistral"


class SelfPrunedMistralForCausalLM(SelfPrunedMixin, MistralForCausalLM):
    config_class = SelfPrunedMistralConfig
    layer_class = MistralDecoderLayer


class SelfPrunedQwen2Config(SelfPrunedConfigMixin, Qwen2Config):
    model_type = "selfpruned_qwen2"


class SelfPrunedQwen2ForCausalLM(SelfPrunedMixin, Qwen2ForCausalLM):
    config_class = SelfPrunedQwen2Config
    layer_class = Qwen2DecoderLayer


class SelfPrunedQwen3Config(SelfPrunedConfigMixin, Qwen3Config):
    model_type = "selfpruned_qwen3"


class SelfPrunedQwen3ForCausalLM(SelfPrunedMixin, Qwen3ForCausalLM):
    config_class = SelfPrunedQwen3Config
    layer_class = Qwen3DecoderLayer


class SelfPrunedGemmaConfig(SelfPrunedConfigMixin, GemmaConfig):
    model_type = "selfpruned_gemma"


class SelfPrunedGemmaForCausalLM(SelfPrunedMixin, GemmaForCausalLM):
    config_class = SelfPrunedGemmaConfig
    layer_class = GemmaDecoderLayer


class SelfPrunedGemma2Config(SelfPrunedConfigMixin, Gemma2Config):
    model_type = "selfpruned_gemma2"


class SelfPrunedGemma2ForCausalLM(SelfPrunedMixin, Gemma2ForCausalLM):
    config_class = SelfPrunedGemma2Config
    layer_class = Gemma2DecoderLayer


class SelfPrunedGemma3TextConfig(SelfPrunedConfigMixin, Gemma3TextConfig):
    model_type = "selfpruned_gemma3_text"


class SelfPrunedGemma3ForCausalLM(SelfPrunedMixin, Gemma3ForCausalLM):
    config_class = SelfPrunedGemma3TextConfig
    config: SelfPrunedGemma3TextConfig
    layer_class = Gemma3DecoderLayer


class SelfPrunedPhi3Config(SelfPrunedConfigMixin, Phi3Config):
    model_type = "selfpruned_phi3"


class SelfPrunedPhi3ForCausalLM(SelfPrunedMixin, Phi3ForCausalLM):
    config_class = SelfPrunedPhi3Config
    layer_class = Phi3DecoderLayer


MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    cls.config_class.model_type.removeprefix("selfpruned_"): cls
    for cls in (
        SelfPrunedLlamaForCausalLM,
        SelfPrunedMistralForCausalLM,
        SelfPrunedQwen2ForCausalLM,
        SelfPrunedQwen3ForCausalLM,
        SelfPrunedGemmaForCausalLM,
        SelfPrunedGemma2ForCausalLM,
        SelfPrunedGemma3ForCausalLM,
        SelfPrunedPhi3ForCausalLM,
    )
}
"""The pruned model class of each dense `model_type`."""

for _class in MODEL_CLASSES.values():
    # `register_for_auto_class` makes save_pretrained copy this file and write `auto_map`; `register` lets the Auto
    # classes find these without `trust_remote_code` once this module is imported.
    _class.config_class.register_for_auto_class()
    _class.register_for_auto_class("AutoModelForCausalLM")
    AutoConfig.register(_class.config_class.model_type, _class.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_class.config_class, _class, exist_ok=True)
