"""The work of a pass over a model, counted from its configuration: the ideal that a speed-up is held against."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from selfpruner_hub.models.architectures import shape_of


@dataclass(frozen=True)
class Workload:
    """The matrices of a model, which do nearly all of the work."""

    layer_weights: int
    """Weights of q, k, v, o, gate, up and down of all layers."""
    head_weights: int
    """Weights of the language-model head."""
    cached: int
    """Elements of keys and values that one token leaves in the caches of all layers."""
    attended: int
    """Query heads × head size, summed over the layers."""

    def prefill_flops(self, batch: int, prompt: int) -> int:
        """Floating-point operations of reading prompts: all matrices, causal attention, the head on the last token.

        Args:
            batch: Prompts.
            prompt: Tokens of each.

        Returns:
            Multiplications and additions.
        """
        pairs = prompt * (prompt + 1) // 2
        return 2 * batch * (prompt * self.layer_weights + 2 * pairs * self.attended + self.head_weights)

    def decode_bytes(self, batch: int, context: int, weight_bytes: float, cache_bytes: float) -> float:
        """Memory that one step of decoding reads: every weight once, and the cache of every sequence.

        Args:
            batch: Sequences.
            context: Tokens that each has behind it.
            weight_bytes: Of a weight.
            cache_bytes: Of an element of the cache.

        Returns:
            Bytes.
        """
        weights = self.layer_weights + self.head_weights
        return weight_bytes * weights + cache_bytes * batch * context * self.cached


def workload_of(config: PreTrainedConfig) -> Workload:
    """Count the matrices of a dense or pruned model."""
    shape = shape_of(config)
    groups = sum(widths.num_key_value_heads for widths in shape.dense.layers)
    return Workload(
        layer_weights=shape.weights(shape.dense),
        head_weights=config.hidden_size * config.vocab_size,
        cached=2 * groups * shape.head_dim,
        attended=groups * shape.queries_per_group * shape.head_dim,
    )
