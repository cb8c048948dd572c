"""Models whose decoder layers differ in width.

This file imports torch and transformers only: it is copied beside the weights of every pruned model, cut down to the
family of that model, so that `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` and vLLM work
without `selfpruner_hub`.

A decoder layer is the stock layer of its architecture, built with its own widths; no forward pass is rewritten.
The widths are in transformers' `per_layer_config` (`num_attention_heads`, `num_key_value_heads`, `intermediate_size`;
of a mixture, the number of experts and of those that a token is routed to), the dense values at the top level.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

FAMILIES = (
    "arcee",
    "cohere",
    "cohere2",
    "cwm",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_dense",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
    "vaultgemma",
)
"""The dense `model_type`s that have classes here; a copy beside weights lists its own alone."""

AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
"""The Auto classes that find pruned models, if transformers has a class of the architecture for them."""


class LayerConfig:
    """The configuration of one layer: its own widths; all other attributes are read from the model's configuration.

    They are read at each access, because a layer reads `_attn_implementation` at every call: a copy made before it is
    resolved would run without a causal mask, and a later copy would ignore `set_attn_implementation`.

    Args:
        config: Configuration of the whole model.
        **widths: Attributes that belong to this layer. Their other names follow: the router of OLMoE reads
            `num_experts`, and its experts read `num_local_experts`.
    """

    def __init__(self, config: PreTrainedConfig, **widths: int) -> None:
        aliases = {alias: widths[name] for alias, name in type(config).attribute_map.items() if name in widths}
        self.__dict__.update(widths | aliases)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        """Read an attribute that is not the layer's own from the model's configuration."""
        if name.startswith("__") or "_config" not in self.__dict__:  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""The attributes of a dense model that `per_layer_config` may override."""
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts of a layer, which it may override in a mixture of experts, as it may their number for
a token."""


def widths_in(config: type[PreTrainedConfig]) -> tuple[str, ...]:
    """The attributes that `per_layer_config` may override, by the names that they are stored under."""
    for name in EXPERT_COUNTS:
        stored = config.attribute_map.get(name, name)
        if {name, stored} & config.__dataclass_fields__.keys():
            return stored, config.attribute_map.get("num_experts_per_tok", "num_experts_per_tok")
    return WIDTHS


def _homogeneous(config: PreTrainedConfig) -> PreTrainedConfig:
    """A shallow copy with only the dense values."""
    dense = copy.copy(config)
    dense.per_layer_config = None
    return dense


class SelfPrunedConfigMixin:
    """A configuration whose layers differ: stock checks on the dense values, width checks on each layer."""

    def validate(self) -> None:
        """Raise `ValueError` unless every layer has whole groups of query heads, and channels or enough experts."""
        super(SelfPrunedConfigMixin, _homogeneous(self)).validate()
        widths = widths_in(type(self))
        for index, layer in enumerate(self.per_layer_config):
            if widths != WIDTHS:
                if (experts := getattr(layer, widths[0])) < layer.num_experts_per_tok:
                    raise ValueError(
                        f"Layer {index} cannot have {experts} experts and route a token to {layer.num_experts_per_tok}."
                    )
                continue
            heads, groups, channels = (getattr(layer, name) for name in WIDTHS)
            if groups < 1 or channels < 1 or heads % groups:
                raise ValueError(
                    f"Layer {index} cannot have {heads} query heads, {groups} KV heads and {channels} FFN channels."
                )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and say which classes of this file, saved beside it, the Auto classes take."""
        code = Path(__file__)
        autos = [auto for auto in AUTO_CLASSES if type(self) in auto._model_mapping]
        classes = {"AutoConfig": type(self), **{auto.__name__: auto._model_mapping[type(self)] for auto in autos}}
        if divisor := getattr(self, "logits_scaling", None):
            self.logit_scale = 1 / divisor  # Granite's, by the name that vLLM's Transformers backend reads
        self.auto_map = {name: f"{code.stem}.{cls.__name__}" for name, cls in classes.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        families = f'FAMILIES = ("{self.model_type.removeprefix(PREFIX)}",)'
        text = re.sub(r"^FAMILIES = \([^)]*\)", families, code.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
        (Path(save_directory) / code.name).write_text(text, encoding="utf-8")


class SelfPrunedMixin:
    """Builds the stock model around decoder layers of their own widths."""

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig) -> None:
        # The stock constructor would give every layer the dense widths, so let it build no layers.
        skeleton = _homogeneous(config)
        skeleton.num_hidden_layers = 0
        super().__init__(skeleton)
        config._attn_implementation_internal = skeleton._attn_implementation_internal
        config._experts_implementation_internal = skeleton._experts_implementation_internal
        # Rotary modules keep the skeleton: they read head counts, of which the whole model has no single one.
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and module.config is skeleton:
                module.config = config
        widths = widths_in(type(config))
        self.base_model.layers = nn.ModuleList(
            self.layer_class(LayerConfig(config, **{name: getattr(layer, name) for name in widths}), index)
            for index, layer in enumerate(config.per_layer_config)
        )
        self.post_init()


PREFIX = "selfpruned_"
"""What the `model_type` of a pruned model has before the dense one."""


def _subclass(mixin: type, stock: type, **attributes: Any) -> type:
    """Define the pruned class of a stock class as an attribute of this module, named after it."""
    name = f"SelfPruned{stock.__name__}"
    globals()[name] = type(name, (mixin, stock), {"__module__": __name__, **attributes})
    return globals()[name]


def _define(family: str) -> type[PreTrainedModel]:
    """Define the classes of a dense `model_type`, tell the Auto classes of them, and return the language model.

    `register_for_auto_class` makes `save_pretrained` copy this file; `register` lets the Auto classes find the classes
    without `trust_remote_code` once this module is imported.
    """
    stock_config = CONFIG_MAPPING[family]
    language_model = AutoModelForCausalLM._model_mapping[stock_config]
    layer = getattr(sys.modules[language_model.__module__], language_model._no_split_modules[0])  # LlamaDecoderLayer
    config = _subclass(SelfPrunedConfigMixin, stock_config, model_type=PREFIX + family)
    config.register_for_auto_class()
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto in AUTO_CLASSES:
        if stock_config in auto._model_mapping:
            stock = auto._model_mapping[stock_config]
            auto.register(
                config, _subclass(SelfPrunedMixin, stock, config_class=config, layer_class=layer), exist_ok=True
            )
    return AutoModelForCausalLM._model_mapping[config]


MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {family: _define(family) for family in FAMILIES}
"""The pruned language model class of each dense `model_type`."""
