"""Locations of the prunable weights of each supported architecture: a table with one row per `model_type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from selfpruner_hub.errors import UnsupportedArchitectureError
from selfpruner_hub.models.mixtures.table import EXPERTS, Experts
from selfpruner_hub.models.modeling_selfpruned import MODEL_CLASSES, WIDTHS, widths_in
from selfpruner_hub.models.unsupported import reason
from selfpruner_hub.plans.plan import BY_EXPERT, LayerWidths, ModelShape, Plan

Block = Literal["query", "key_value", "channel"]
"""Kind of a block of output rows: query heads of the KV groups, their key (or value) heads, or FFN channels."""


@dataclass(frozen=True)
class Projection:
    """A linear module whose output rows are prunable."""

    path: str
    """Module path inside a decoder layer."""
    blocks: tuple[Block, ...]
    """Blocks of rows, in order; a fused projection has several."""


@dataclass(frozen=True)
class Architecture:
    """Module paths inside a decoder layer of one `model_type`."""

    model_type: str
    inputs: tuple[Projection, ...]
    """Projections that read the residual stream: q, k, v and gate, up, fused or not."""
    attention_output: str = "self_attn.o_proj"
    ffn_output: str = "mlp.down_proj"
    norms: tuple[Projection, ...] = ()
    """Norms of queries and keys whose weights belong to heads, and are cut with them; not every model has them."""
    whole_attention: bool = False
    """Whether every KV group stays: the norms of queries and keys span all heads, so that each head depends on all."""
    output_norms: bool = False
    """Whether the outputs of attention and FFN are normalised before they are added to the residual stream."""
    norm_unit: float = 0.0
    """Constant that a norm adds to its weight before it multiplies by it."""
    experts: Experts | None = None
    """Routed experts, which are then the units of the FFNs; `ffn_output` is the block that holds them."""

    @property
    def ffn_inputs(self) -> tuple[Projection, ...]:
        """The projections whose rows are FFN channels: gate and up, fused or not."""
        return tuple(p for p in self.inputs if p.blocks[0] == "channel")

    @property
    def rows(self) -> tuple[Projection, ...]:
        """All modules whose rows are prunable."""
        return self.inputs + self.norms


_QKV = (
    Projection("self_attn.q_proj", ("query",)),
    Projection("self_attn.k_proj", ("key_value",)),
    Projection("self_attn.v_proj", ("key_value",)),
)
_FUSED_QKV = (Projection("self_attn.qkv_proj", ("query", "key_value", "key_value")),)
_GATE_UP = (Projection("mlp.gate_proj", ("channel",)), Projection("mlp.up_proj", ("channel",)))
_FUSED_GATE_UP = (Projection("mlp.gate_up_proj", ("channel", "channel")),)
_UP = (Projection("mlp.up_proj", ("channel",)),)
_SEPARATE = _QKV + _GATE_UP
_HEAD_NORMS = (Projection("self_attn.q_norm", ("query",)), Projection("self_attn.k_norm", ("key_value",)))

ARCHITECTURES = {
    row.model_type: row
    for row in (
        Architecture("llama", _SEPARATE),  # LLaMA-1/2/3, Vicuna, SmolLM2
        Architecture("mistral", _SEPARATE),
        Architecture("qwen2", _SEPARATE),
        Architecture("qwen3", _SEPARATE),
        Architecture("gemma", _SEPARATE, norm_unit=1.0),
        Architecture("gemma2", _SEPARATE, output_norms=True, norm_unit=1.0),
        Architecture("gemma3_text", _SEPARATE, output_norms=True, norm_unit=1.0),
        Architecture("phi3", _FUSED_QKV + _FUSED_GATE_UP),  # Phi-3, Phi-3.5, Phi-4, Phi-4-mini
        Architecture("arcee", _QKV + _UP),
        Architecture("cohere", _SEPARATE, norms=_HEAD_NORMS),  # Command-R, Aya
        Architecture("cohere2", _SEPARATE),
        Architecture("cwm", _SEPARATE),
        Architecture("ernie4_5", _SEPARATE),
        Architecture("exaone4", _SEPARATE, output_norms=True),
        Architecture("glm", _QKV + _FUSED_GATE_UP),
        Architecture("glm4", _QKV + _FUSED_GATE_UP, output_norms=True),
        Architecture("granite", _SEPARATE),
        Architecture("hunyuan_v1_dense", _SEPARATE),
        Architecture("ministral", _SEPARATE),
        Architecture("ministral3", _SEPARATE),
        Architecture("olmo2", _SEPARATE, norms=_HEAD_NORMS, whole_attention=True, output_norms=True),
        Architecture("olmo3", _SEPARATE, norms=_HEAD_NORMS, whole_attention=True, output_norms=True),
        Architecture("seed_oss", _SEPARATE),
        Architecture("smollm3", _SEPARATE),
        Architecture("starcoder2", _QKV + (Projection("mlp.c_fc", ("channel",)),), ffn_output="mlp.c_proj"),
        Architecture("vaultgemma", _SEPARATE, norm_unit=1.0),
        *(Architecture(t, (), ffn_output=row.block, whole_attention=True, experts=row) for t, row in EXPERTS.items()),
    )
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Look up the architecture of a configuration.

    Args:
        config: Configuration of a dense or pruned model.

    Returns:
        The table row of its `model_type`.

    Raises:
        UnsupportedArchitectureError: The table has no such `model_type`, or the experts are in several groups.
    """
    model_type = config.model_type.removeprefix("selfpruned_")
    if model_type not in ARCHITECTURES:
        because = reason(config)
        raise UnsupportedArchitectureError(
            f"Models of type {model_type!r} are not supported{because and f': {because}'}.",
            f"Supported: {', '.join(sorted(ARCHITECTURES))} (text decoders only).",
        )
    row = ARCHITECTURES[model_type]
    if row.experts is not None:
        row.experts.check(config)
    return row


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The pruned model class, with layers of different widths, for `config`'s architecture."""
    return MODEL_CLASSES[architecture_of(config).model_type]


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers for `config`'s architecture."""
    config_class = CONFIG_MAPPING[architecture_of(config).model_type]
    return cast(type[PreTrainedModel], AutoModelForCausalLM._model_mapping[config_class])


def is_stock(model: PreTrainedModel) -> bool:
    """Whether a model is of a class of transformers, not of one whose layers have widths of their own."""
    return not isinstance(model, tuple(MODEL_CLASSES.values()))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers, first layer first."""
    layers = model.get_decoder().layers
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no stack of decoder layers.")
    return layers


def linear(layer: nn.Module, path: str) -> nn.Linear:
    """The linear module at `path` inside a decoder layer."""
    return cast(nn.Linear, layer.get_submodule(path))


def residual_scale(config: PreTrainedConfig) -> float:
    """The factor on the outputs of attention and FFN as they are added to the residual stream (Granite)."""
    return float(getattr(config, "residual_multiplier", 1.0))


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor on the outputs of the language-model head (Cohere, Granite)."""
    divisor = getattr(config, "logits_scaling", None)  # where it is, logit_scale is a copy of it for vLLM
    return float(1 / divisor if divisor else getattr(config, "logit_scale", 1.0))


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Read the prunable geometry from a configuration; its layers may already differ in width.

    Args:
        config: Configuration of a dense or pruned model.

    Returns:
        The geometry.

    Raises:
        UnsupportedArchitectureError: The architecture is not supported, or no layer of a mixture has routed experts.
    """
    architecture, layers = architecture_of(config), list(config.per_layer_config)
    first = layers[0]
    head_dim = getattr(first, "head_dim", None) or first.hidden_size // first.num_attention_heads
    attention = {
        "hidden_size": config.hidden_size,
        "head_dim": head_dim,
        "queries_per_group": first.num_attention_heads // first.num_key_value_heads,
        "whole_attention": architecture.whole_attention,
    }
    groups = [c.num_key_value_heads for c in layers]
    if (experts := architecture.experts) is None:
        dense = Plan.of([c.intermediate_size for c in layers], groups)
        return ModelShape(
            **attention, dense=dense, ffn_matrices=1 + sum(len(p.blocks) for p in architecture.ffn_inputs)
        )
    counts = [getattr(c, experts.count) if experts.placed(config, index) else 0 for index, c in enumerate(layers)]
    if not any(counts):
        raise UnsupportedArchitectureError("No layer of this model has routed experts.", "Choose a mixture that has.")
    return ModelShape(
        **attention,
        dense=Plan.of(counts, groups, BY_EXPERT),
        expert_weights=experts.weights(config),
        fewest_units=max(c.num_experts_per_tok for c in layers),
    )


def experts_of(config: PreTrainedConfig) -> Experts:
    """The row of a mixture's experts; `UnsupportedArchitectureError` for a model without any."""
    if (experts := architecture_of(config).experts) is None:
        raise UnsupportedArchitectureError("This model has no experts.", "Choose a mixture of experts.")
    return experts


def output_columns(architecture: Architecture, shape: ModelShape, kept: LayerWidths) -> dict[str, int]:
    """Columns that the output projections of a layer keep, by their paths; none of a mixture lose any."""
    if architecture.experts is not None:
        return {}
    return {
        architecture.attention_output: block_rows(shape, kept, "query"),
        architecture.ffn_output: kept.intermediate_size,
    }


def own_widths(config: PreTrainedConfig, plan: Plan) -> list[dict[str, int]]:
    """The attributes that the configuration of each layer has of its own under a plan.

    Args:
        config: Configuration of the dense model.
        plan: Widths of some of its layers, or of all.

    Returns:
        Values by name, one dictionary per layer. A layer without experts gets the largest number of the others, which
        it does not read. A layer with fewer experts than a token is routed to routes it to all of them.
    """
    architecture, shape = architecture_of(config), shape_of(config)
    if architecture.experts is not None:
        most = max(kept.intermediate_size for kept in plan.layers)
        counts = [kept.intermediate_size or most for kept in plan.layers]
        names, top_k = widths_in(CONFIG_MAPPING[architecture.model_type]), shape.fewest_units
        return [dict(zip(names, (n, min(n, top_k)), strict=True)) for n in counts]
    widths = (
        (kept.num_key_value_heads * shape.queries_per_group, kept.num_key_value_heads, kept.intermediate_size)
        for kept in plan.layers
    )
    return [dict(zip(WIDTHS, values, strict=True)) for values in widths]


def expert_tensors(architecture: Architecture, layer: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Tensors of a layer that are indexed by expert, by name, with the dimension of the experts; none without them."""
    indexed = architecture.experts.indexed if architecture.experts is not None else {}
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {name: (tensors[name].data, dimension) for name, dimension in indexed.items() if name in tensors}


def unit_rows(shape: ModelShape, block: Block) -> int:
    """Count the output rows of one KV group, or of one channel, in a block of this kind."""
    return {"query": shape.queries_per_group * shape.head_dim, "key_value": shape.head_dim, "channel": 1}[block]


def block_rows(shape: ModelShape, kept: LayerWidths, block: Block) -> int:
    """Count the output rows of a block of this kind in a layer with the widths `kept`."""
    return unit_rows(shape, block) * (kept.intermediate_size if block == "channel" else kept.num_key_value_heads)
