"""Work of a forward pass, counted from a model's configuration; the ratio of two models is the ideal speed-up."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from selfpruner_hub.models.architectures import shape_of


@dataclass(frozen=True)
class Workload:
    """Sizes of a model's matrices and KV cache, which cause nearly all of the work."""

    layer_weights: int
    """Number of weights of q, k, v, o, gate, up and down in all layers."""
    head_weights: int
    """Number of weights of the output head."""
    cached: int
    """Number of KV-cache elements for one token, over all layers."""
    attended: int
    """Query heads × head size, summed over the layers."""

    def prefill_flops(self, batch: int, prompt: int) -> int:
        """Count the operations of prefill: all matrices, causal attention, and the output head on the last token.

        Args:
            batch: Number of prompts.
            prompt: Length of each prompt, in tokens.

        Returns:
            Floating-point operations; a multiplication and an addition are two.
        """
        pairs = prompt * (prompt + 1) // 2
        return 2 * batch * (prompt * self.layer_weights + 2 * pairs * self.attended + self.head_weights)

    def decode_bytes(self, batch: int, context: int, weight_bytes: float, cache_bytes: float) -> float:
        """Count the bytes that one decode step reads: every weight once, and the KV cache of every sequence.

        Args:
            batch: Number of sequences.
            context: Number of tokens in each sequence's cache.
            weight_bytes: Bytes of a weight.
            cache_bytes: Bytes of a KV-cache element.

        Returns:
            Number of bytes.
        """
        weights = self.layer_weights + self.head_weights
        return weight_bytes * weights + cache_bytes * batch * context * self.cached


def workload_of(config: PreTrainedConfig) -> Workload | None:
    """Count the matrix and cache sizes of a dense or pruned model.

    Args:
        config: Its configuration.

    Returns:
        The sizes; None of a mixture of experts, whose work depends on where its tokens are routed.
    """
    shape = shape_of(config)
    if shape.expert_weights:
        return None
    groups = sum(widths.num_key_value_heads for widths in shape.dense.layers)
    return Workload(
        layer_weights=shape.weights(shape.dense),
        head_weights=config.hidden_size * config.vocab_size,
        cached=2 * groups * shape.head_dim,
        attended=groups * shape.queries_per_group * shape.head_dim,
    )
