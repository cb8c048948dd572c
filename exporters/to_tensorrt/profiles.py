"""Optimisation profiles: the input sizes that TensorRT builds the kernels of an engine for."""

from __future__ import annotations

from dataclasses import dataclass

from selfpruner_hub.errors import UserError
from selfpruner_hub.plans.plan import ModelShape

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of an input."""


@dataclass(frozen=True)
class Profile:
    """Sizes of the inputs in one phase, prefill or decode; each is (smallest, usual, largest)."""

    name: str
    batch: tuple[int, int, int]
    length: tuple[int, int, int]
    """Number of new tokens."""
    past: tuple[int, int, int]
    """Number of tokens in the cache."""
    logit_positions: tuple[int, int, int]
    """Number of positions that get logits."""
    context: int
    """Largest number of tokens in the cache after the pass."""

    def input_shapes(self, shape: ModelShape) -> dict[str, Shapes]:
        """Compute the shapes of all inputs of a model's graph.

        Args:
            shape: Shape of the model.

        Returns:
            For each input, by name, its smallest, usual and largest shape.
        """
        total = (1, self.length[1] + self.past[1], self.context)
        inputs = {
            "input_ids": _shapes(self.batch, self.length),
            "attention_mask": _shapes(self.batch, total),
            "position_ids": _shapes(self.batch, self.length),
            "logits_to_keep": _shapes(self.logit_positions),
        }
        for index, layer in enumerate(shape.dense.layers):
            for what in ("keys", "values"):
                inputs[f"input.cache.layers.{index}.{what}"] = _shapes(
                    self.batch, layer.num_key_value_heads, self.past, shape.head_dim
                )
        return inputs


def profiles(batch: int, context: int) -> tuple[Profile, Profile]:
    """Make the profiles of prefill and decode.

    Args:
        batch: Largest number of sequences at a time, at least 1.
        context: Largest number of tokens of a sequence, at least 2.

    Returns:
        Prefill: many new tokens, usually after an empty cache. Decode: one new token after a long cache.

    Raises:
        UserError: A size is not a whole number in its range.
    """
    for name, value, least in (("batch", batch, 1), ("context", context, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    sequences, half, one = (1, batch, batch), context // 2, (1, 1, 1)
    return (
        Profile("prefill", sequences, (1, half, context), (0, 0, context - 1), (1, 1, context), context),
        Profile("decode", sequences, one, (0, half, context - 1), one, context),
    )


def _shapes(*axes: int | tuple[int, int, int]) -> Shapes:
    smallest, usual, largest = (tuple(a if isinstance(a, int) else a[i] for a in axes) for i in range(3))
    return smallest, usual, largest
