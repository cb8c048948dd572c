"""Tiny random mixtures of experts, of every supported type, and the same with experts masked in their routers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from selfpruner_hub.models.architectures import architecture_of, decoder_layers, shape_of
from selfpruner_hub.pruning.importance import LayerOrder
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.slicing import Slicer, slice_model

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FINE = {"num_experts_per_tok": 3, "moe_intermediate_size": 12}
DENSE_FIRST = {
    **SMALL, **FINE, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
MIXTURES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=8),
    "olmoe": OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=3),
    "qwen2_moe": Qwen2MoeConfig(
        **SMALL, **FINE, num_experts=8, shared_expert_intermediate_size=20, mlp_only_layers=[0]
    ),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **FINE, num_experts=8, head_dim=8, norm_topk_prob=True),
    "granitemoe": GraniteMoeConfig(**SMALL, num_local_experts=8, residual_multiplier=0.5, logits_scaling=2.0),
    "granitemoeshared": GraniteMoeSharedConfig(**SMALL, num_local_experts=8, shared_intermediate_size=16),
    "gpt_oss": GptOssConfig(
        **SMALL, num_local_experts=8, num_experts_per_tok=2, head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "glm4_moe": Glm4MoeConfig(**DENSE_FIRST, head_dim=8),
    "dots1": Dots1Config(**DENSE_FIRST, head_dim=8, norm_topk_prob=True),
    "deepseek_v2": DeepseekV2Config(**{**DENSE_FIRST, **LATENT}),
    "deepseek_v3": DeepseekV3Config(**{**DENSE_FIRST, **LATENT}),
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **SMALL, moe_num_experts=8, moe_k=2, moe_intermediate_size=12, moe_num_shared_experts=1,
        moe_layer_start_index=1, moe_layer_end_index=2,
    ),
}  # fmt: skip
"""One configuration per type; layers without experts, shared experts, biases, factors, MHA and MLA."""


def tiny_mixture(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Build the mixture `name` of `MIXTURES` with random weights whose routers tell tokens apart."""
    torch.manual_seed(seed)
    kind = type(MIXTURES[name])
    config = kind.from_dict({**MIXTURES[name].to_dict(), **changes})
    model = MODEL_FOR_CAUSAL_LM_MAPPING[kind](config).eval()
    row = architecture_of(config).experts
    for key, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(parameter.data, std=0.05)
        elif f".{row.block}.{row.router}." in key:
            torch.nn.init.normal_(parameter.data, std=0.6)
        elif "norm" not in key and "inv_freq" not in key:
            torch.nn.init.normal_(parameter.data, std=0.1)
    return model


class Case(NamedTuple):
    """A mixture, the experts that each layer keeps, and its cut."""

    whole: PreTrainedModel
    kept: list[Tensor]
    cut: PreTrainedModel


def cut_by(whole: PreTrainedModel, counts: tuple[int, ...], *, stock: bool = False) -> Case:
    """Keep so many experts of each layer that has any, at random."""
    shape, generator = shape_of(whole.config), torch.Generator().manual_seed(1)
    order = [
        LayerOrder(torch.arange(w.num_key_value_heads), torch.randperm(w.intermediate_size, generator=generator))
        for w in shape.dense.layers
    ]
    numbers = [min(n, w.intermediate_size) for n, w in zip(counts, shape.dense.layers, strict=True)]
    plan = shape.plan(numbers, [w.num_key_value_heads for w in shape.dense.layers])
    with ordered(whole, order):
        cut = slice_model(Slicer(whole), plan, stock=stock)
    return Case(whole, [each.channels[:n] for each, n in zip(order, numbers, strict=True)], cut)


@contextmanager
def masked(model: PreTrainedModel, kept: Sequence[Tensor]) -> Iterator[None]:
    """Let routers see only the experts `kept` of each layer: the logits of the others are -inf."""
    row = architecture_of(model.config).experts
    masks, biases = {}, []
    for layer, keep in zip(decoder_layers(model), kept, strict=True):
        if len(keep):
            block = layer.get_submodule(row.block)
            router = block.get_submodule(row.router)
            mask = torch.full((len(router.weight),), -torch.inf)
            mask[keep] = 0
            masks[router.weight.data_ptr()] = mask
            if row.bias:
                owner, _, leaf = row.bias.rpartition(".")
                bias = getattr(block.get_submodule(owner), leaf)
                biases.append((bias, bias.clone(), mask))
    plain = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        mask = masks.get(weight.data_ptr())
        return plain(x, weight, bias) if mask is None else plain(x, weight, bias) + mask

    torch.nn.functional.linear = linear
    for bias, _, mask in biases:
        bias.data.add_(mask)
    try:
        yield
    finally:
        torch.nn.functional.linear = plain
        for bias, before, _ in biases:
            bias.data.copy_(before)
