"""Locations of experts and router of each supported mixture of experts: a table with one row per `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from transformers import CONFIG_MAPPING, PreTrainedConfig

from selfpruner_hub.errors import UnsupportedArchitectureError
from selfpruner_hub.models.modeling_selfpruned import widths_in

Sum = Literal["chosen", "alive", "nothing"]
"""What the weights of a token's experts are divided by: the sum of theirs, that of all experts', or nothing."""


def _everywhere(_config: PreTrainedConfig, _index: int) -> bool:
    return True


def _by_step(config: PreTrainedConfig, index: int) -> bool:
    return index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0


def _after_dense(config: PreTrainedConfig, index: int) -> bool:
    return index >= (config.first_k_dense_replace or 0)


def _in_range(config: PreTrainedConfig, index: int) -> bool:
    within = config.moe_layer_start_index <= index <= config.moe_layer_end_index
    return within and (index + 1) % config.moe_layer_interval == 0


@dataclass(frozen=True)
class Experts:
    """Routed experts of one `model_type`; module paths are inside a decoder layer."""

    model_type: str
    block: str = "mlp"
    """Path of the module whose output is that of the FFN; it holds the experts, as `experts`."""
    router: str = "gate"
    """Path of the router inside the block."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Further tensors indexed by expert, by their path inside the block, with the dimension of the experts."""
    width: str = "moe_intermediate_size"
    """Attribute of the configuration with the channels of an expert."""
    placed: Callable[[PreTrainedConfig, int], bool] = _everywhere
    """Function that says whether a layer has experts, from the configuration and the index of the layer."""
    shared: str = ""
    """Path inside the layer of the output projection of the shared expert; empty where there is none."""
    shared_gate: str = ""
    """Path inside the layer of the gate whose sigmoid multiplies the shared expert; empty where there is none."""
    in_float32: bool = False
    """Whether the router multiplies in float32, whatever the dtype of the model; near ties are decided by it."""
    sigmoid: bool = False
    """Whether the weight of an expert is the sigmoid of its logit; else it is the exponential."""
    bias: str = ""
    """Path inside the block of the bias that the choice of experts adds to their scores; empty where there is none."""
    divided_by: Sum | Literal["by norm_topk_prob"] = "chosen"
    """What the weights of the chosen experts are divided by; a setting of the configuration may say it."""
    scale: str = ""
    """Attribute of the configuration by which the weights are multiplied; empty for 1."""

    fewest: int = 1
    """Fewest experts that the router can choose among; those of DeepSeek-V3 read the best two of each group."""

    @property
    def count(self) -> str:
        """Attribute with the number of experts, by the name that it is stored under."""
        return widths_in(CONFIG_MAPPING[self.model_type])[0]

    @property
    def indexed(self) -> dict[str, int]:
        """Paths inside the layer of all tensors that are indexed by expert, with the dimension of the experts."""
        dimensions = {"experts.gate_up_proj": 0, "experts.down_proj": 0, f"{self.router}.weight": 0, **self.others}
        return {f"{self.block}.{path}": dimension for path, dimension in dimensions.items()}

    def sum_of(self, config: PreTrainedConfig) -> Sum:
        """What the weights of the chosen experts are divided by in a model of this configuration."""
        if self.divided_by != "by norm_topk_prob":
            return self.divided_by
        return "chosen" if config.norm_topk_prob else "nothing" if self.sigmoid else "alive"

    def weights(self, config: PreTrainedConfig) -> int:
        """Count the weights of an expert and its row of the router (no biases)."""
        return int(config.hidden_size * (3 * getattr(config, self.width) + 1))

    def check(self, config: PreTrainedConfig) -> None:
        """Raise `UnsupportedArchitectureError` where a token chooses among groups of experts."""
        groups = getattr(config, "n_group", None) or 1
        if groups > 1 and getattr(config, "topk_method", "") != "greedy":
            raise UnsupportedArchitectureError(
                f"Models of type {self.model_type!r} with {groups} groups of experts are not supported: "
                "every group would have to lose the same number.",
                "Choose a mixture whose experts are in one group (n_group=1).",
            )


_corrected = partial(
    Experts,
    others={"gate.e_score_correction_bias": 0},
    placed=_after_dense,
    shared="mlp.shared_experts.down_proj",
    in_float32=True,
    sigmoid=True,
    fewest=2,
    bias="gate.e_score_correction_bias",
    divided_by="by norm_topk_prob",
    scale="routed_scaling_factor",
)

EXPERTS = {
    row.model_type: row
    for row in (
        Experts("mixtral", width="intermediate_size"),
        Experts("olmoe", width="intermediate_size", divided_by="by norm_topk_prob"),
        Experts(
            "qwen2_moe",
            placed=_by_step,
            shared="mlp.shared_expert.down_proj",
            shared_gate="mlp.shared_expert_gate",
            divided_by="by norm_topk_prob",
        ),
        Experts("qwen3_moe", placed=_by_step, divided_by="by norm_topk_prob"),
        Experts("granitemoe", "block_sparse_moe", "router", width="intermediate_size"),
        Experts(
            "granitemoeshared",
            "block_sparse_moe",
            "router",
            width="intermediate_size",
            shared="shared_mlp.output_linear",
        ),
        Experts(
            "gpt_oss",
            router="router",
            others={"experts.gate_up_proj_bias": 0, "experts.down_proj_bias": 0, "router.bias": 0},
            width="intermediate_size",
        ),
        Experts(
            "deepseek_v2",
            placed=_after_dense,
            shared="mlp.shared_experts.down_proj",
            in_float32=True,
            divided_by="alive",
            scale="routed_scaling_factor",
        ),
        _corrected("deepseek_v3"),
        _corrected("glm4_moe"),
        _corrected("dots1"),
        Experts(
            "ernie4_5_moe",
            others={"gate.moe_statics.e_score_correction_bias": 1},
            placed=_in_range,
            shared="mlp.shared_experts.down_proj",
            in_float32=True,
            bias="gate.moe_statics.e_score_correction_bias",
        ),
    )
}
"""Rows by `model_type`."""
