"""Folds: constants of a model that go into its weights, so that llama.cpp computes the same function.

llama.cpp has two architectures whose layers have heads and FFN widths of their own. `deci` is Llama: RMS norms, SiLU,
and rotation of neighbouring dimensions, whose frequencies can be divided by constants. `openelm` also has norms of
queries and keys; it rotates halves, by plain frequencies, and its output head is the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from selfpruner_hub.errors import UnsupportedArchitectureError
from selfpruner_hub.models.architectures import (
    architecture_of,
    decoder_layers,
    logit_scale,
    residual_scale,
    shape_of,
)
from selfpruner_hub.models.weights import is_tied


@dataclass(frozen=True)
class Row:
    """How models of one `model_type` are written."""

    model_type: str
    permuted: bool = True
    """Whether the rows of q and k are permuted: transformers rotates halves, the architecture neighbours."""
    equal: str = "llama"
    """llama.cpp's architecture of a model whose layers all have the same widths: more programs support it."""
    by_layer: str = "deci"
    """llama.cpp's architecture of a model whose layers have widths of their own."""


WRITABLE = {
    row.model_type: row
    for row in (
        Row("cwm"),
        Row("ernie4_5", permuted=False),
        Row("glm", permuted=False),
        Row("granite"),
        Row("llama"),
        Row("ministral"),
        Row("ministral3"),
        Row("mistral"),
        Row("phi3"),
        Row("qwen2"),
        Row("qwen3", permuted=False, equal="qwen3", by_layer="openelm"),
        Row("seed_oss"),
    )
}
"""The types that can be written. Others have parts that no architecture with widths by layer has, such as other
activations, LayerNorm, norms after attention, or layers without rotation."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies are the default ones divided by constants, at any length of text."""
STILL = 1e30
"""Divisor of the frequency of dimensions that do not turn."""
ELSEWHERE = "Export to onnx, or prune with uniform=True for a model that llama.cpp's own converter may know."


@dataclass(frozen=True)
class Fold:
    """Transformations of the tensors of one model."""

    architecture: str
    permuted: bool
    head_dim: int
    turning: int
    """Number of dimensions of a head that turn, the first ones."""
    frequency_divisors: Tensor
    """Divisors of the default rotary frequencies, float32, `[head_dim / 2]`."""
    epsilon: float
    """Constant under the root of the RMS norms."""
    factors: Mapping[str, float]
    """Factor of a tensor, by its name in llama.cpp without layer and leaf."""
    turning_factor: float = 1.0
    """Factor of the rows of q that turn: the square of YaRN's attention factor, which scales q and k there."""

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one matrix."""
        return self.architecture == "openelm"

    @property
    def divides(self) -> bool:
        """Whether any rotary frequency differs from the default one."""
        return not torch.allclose(self.frequency_divisors, torch.ones_like(self.frequency_divisors))

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Fold the constants into a tensor.

        Args:
            name: Name of the tensor in llama.cpp, without its layer and `.weight` or `.bias`.
            tensor: Weight `[rows, columns]`, or bias or norm `[rows]`.

        Returns:
            The tensor of the file; the tensor itself where nothing changes.
        """
        if (factor := self.factors.get(name, 1.0)) != 1:
            tensor = tensor * factor
        if name not in ("attn_q", "attn_k"):
            return tensor
        heads = tensor.unflatten(0, (-1, self.head_dim))
        turning, still = heads[:, : self.turning], heads[:, self.turning :]
        if name == "attn_q" and self.turning_factor != 1:
            turning = turning * self.turning_factor
        if self.permuted:
            turning = turning.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat([turning, still], 1).flatten(0, 1)


def fold_of(model: PreTrainedModel, equal: bool) -> Fold:
    """Find the fold of a model.

    Granite multiplies embeddings by e, the outputs of attention and FFN by r, scores by a, and divides logits by s.
    The residual stream of the file is 1/e of Granite's: r/e goes into o_proj and down_proj, and ε/e² keeps the norms.
    a √d goes into q_proj, and 1/s into the last norm.

    Args:
        model: Dense or pruned model.
        equal: Whether all layers have the same widths in the file.

    Returns:
        The fold.

    Raises:
        UnsupportedArchitectureError: llama.cpp would compute another function.
    """
    config, rotary = model.config, model.get_decoder().rotary_emb
    model_type = architecture_of(config).model_type
    if architecture_of(config).experts is not None:
        raise UnsupportedArchitectureError(
            "llama.cpp has one number of experts for all layers, and files of mixtures are not written here.",
            "Prune with uniform=True, and convert the saved model with llama.cpp's convert_hf_to_gguf.py.",
        )
    if model_type not in WRITABLE:
        raise UnsupportedArchitectureError(
            f"llama.cpp has no architecture for pruned {model_type} models.",
            f"GGUF can be written for {', '.join(WRITABLE)}. {ELSEWHERE}",
        )
    if config.hidden_act != "silu":
        raise UnsupportedArchitectureError(
            f"llama.cpp computes silu in such models, not {config.hidden_act}.", ELSEWHERE
        )
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise UnsupportedArchitectureError(
            f"A GGUF file cannot hold {kind} rotary embeddings here.",
            f"It can for {', '.join(ROPE_TYPES)}. {ELSEWHERE}",
        )
    row, head_dim = WRITABLE[model_type], shape_of(config).head_dim
    stream = getattr(config, "embedding_multiplier", 1.0)
    scaling: float = decoder_layers(model)[0].self_attn.scaling  # type: ignore[union-attr, assignment]
    factors = {
        "attn_output": residual_scale(config) / stream,
        "ffn_down": residual_scale(config) / stream,
        "attn_q": scaling * math.sqrt(head_dim),
        "output_norm": logit_scale(config),
    }
    fold = Fold(
        architecture=row.equal if equal else row.by_layer,
        permuted=row.permuted,
        head_dim=head_dim,
        turning=2 * len(rotary.inv_freq),
        frequency_divisors=_divisors(rotary.inv_freq, config.rope_parameters["rope_theta"], head_dim),
        epsilon=config.rms_norm_eps / stream**2,
        factors={name: factor for name, factor in factors.items() if not math.isclose(factor, 1)},
        turning_factor=rotary.attention_scaling**2,
    )
    if row.equal == "qwen3":
        _check_qwen3(model, fold)
    return fold


def _check_qwen3(model: PreTrainedModel, fold: Fold) -> None:
    """Refuse what `qwen3` and `openelm` lack: biases, divisors of frequencies, and, with widths by layer, a head."""
    config: PreTrainedConfig = model.config
    if fold.divides or fold.turning_factor != 1:
        kind = config.rope_parameters["rope_type"]
        raise UnsupportedArchitectureError(f"A GGUF file of Qwen3 cannot hold {kind} rotary embeddings.", ELSEWHERE)
    if config.attention_bias:
        raise UnsupportedArchitectureError("llama.cpp has no biases in the attention of Qwen3.", ELSEWHERE)
    if fold.architecture == "openelm" and not is_tied(model):
        raise UnsupportedArchitectureError(
            "llama.cpp has no architecture for pruned Qwen3 models whose output head is not the embedding.", ELSEWHERE
        )


def _divisors(frequencies: Tensor, theta: float, head_dim: int) -> Tensor:
    """Divide the default rotary frequencies by a model's; what does not turn is at the end."""
    half = head_dim // 2
    plain = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    divisors = torch.full((half,), STILL, dtype=torch.float64)
    divisors[: len(frequencies)] = plain[: len(frequencies)] / frequencies.double()
    return divisors.float()
