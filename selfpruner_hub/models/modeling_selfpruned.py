"""Causal language models whose decoder layers differ in width.

This file imports torch and transformers only: it is copied beside the weights of every pruned model, so that
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` works without `selfpruner_hub`.

A decoder layer is the stock layer of its architecture, built with its own widths; no forward pass is rewritten.
The widths are in transformers' `per_layer_config` (`num_attention_heads`, `num_key_value_heads`,
`intermediate_size`), the dense values at the top level of the configuration.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn
from transformers import (
    ArceeForCausalLM,
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2ForCausalLM,
    CohereForCausalLM,
    CwmForCausalLM,
    Ernie4_5ForCausalLM,
    Exaone4ForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    Glm4ForCausalLM,
    GlmForCausalLM,
    GraniteForCausalLM,
    HunYuanDenseV1ForCausalLM,
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    MinistralForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Olmo3ForCausalLM,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SeedOssForCausalLM,
    SmolLM3ForCausalLM,
    Starcoder2ForCausalLM,
    VaultGemmaForCausalLM,
)


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
        # Rotary modules keep the skeleton: they read head counts, of which the whole model has no single one.
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and module.config is skeleton:
                module.config = config
        self.model.layers = nn.ModuleList(
            self.layer_class(LayerConfig(config, **{name: getattr(layer, name) for name in WIDTHS}), index)
            for index, layer in enumerate(config.per_layer_config)
        )
        self.post_init()


def _pruned_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The pruned twin of a stock model class, with its own configuration class; both are attributes of this module."""
    dense: type[PreTrainedConfig] = stock.config_class
    config = type(
        f"SelfPruned{dense.__name__}",
        (SelfPrunedConfigMixin, dense),
        {"__module__": __name__, "model_type": f"selfpruned_{dense.model_type}"},
    )
    layer = getattr(sys.modules[stock.__module__], stock._no_split_modules[0])  # such as LlamaDecoderLayer
    members = {"config_class": config, "layer_class": layer, "__annotations__": {"config": config}}
    model = type(f"SelfPruned{stock.__name__}", (SelfPrunedMixin, stock), {"__module__": __name__, **members})
    globals().update({config.__name__: config, model.__name__: model})
    return model


MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    stock.config_class.model_type: _pruned_class(stock)
    for stock in (
        ArceeForCausalLM,
        Cohere2ForCausalLM,
        CohereForCausalLM,
        CwmForCausalLM,
        Ernie4_5ForCausalLM,
        Exaone4ForCausalLM,
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
        GemmaForCausalLM,
        Glm4ForCausalLM,
        GlmForCausalLM,
        GraniteForCausalLM,
        HunYuanDenseV1ForCausalLM,
        LlamaForCausalLM,
        Ministral3ForCausalLM,
        MinistralForCausalLM,
        MistralForCausalLM,
        Olmo2ForCausalLM,
        Olmo3ForCausalLM,
        Phi3ForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        SeedOssForCausalLM,
        SmolLM3ForCausalLM,
        Starcoder2ForCausalLM,
        VaultGemmaForCausalLM,
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
