"""Decode steps with tensors of fixed size and address, which a CUDA graph needs, for a growing KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import Cache

from exporters.tracing import cache_of, states_of

Tensors = dict[str, Tensor]
DecodeStep = Callable[[Mapping[str, Tensor], Tensors | None], Tensors]
"""Function that runs one decode step on inputs by name, and writes outputs by name (None allocates them)."""
Capture = Callable[[Callable[[], None]], Callable[[], object]]
"""Function that captures another function as a CUDA graph, and returns the replay on the same tensors."""
WINDOW_STEP = 256
"""Step of window lengths, in tokens: after this many tokens, a longer window is made and captured."""


def layer_names(side: str, layers: int) -> list[str]:
    """Names of a graph's keys and values, layer by layer.

    Args:
        side: Prefix, `"input"` or `"output"`.
        layers: Number of layers.

    Returns:
        `input.cache.layers.0.keys`, `input.cache.layers.0.values`, …
    """
    return [f"{side}.cache.layers.{index}.{what}" for index in range(layers) for what in ("keys", "values")]


class FixedWindow:
    """The KV cache of decode steps in buffers of a fixed length. The tokens are at the end; the rest is masked.

    A token's place in the buffer does not matter: keys are already rotated, and the graph's causal and sliding masks
    depend on distances only.

    Args:
        run: Function that runs a step.
        cache: Keys and values of the tokens so far, fewer than `limit`.
        limit: Largest number of tokens in the graph's cache.
        capture: Function that captures a step as a CUDA graph; None runs each step without one.
    """

    def __init__(self, run: DecodeStep, cache: Cache, limit: int, capture: Capture | None = None) -> None:
        self._run = run
        past = cache.get_seq_length()
        self.size = min(limit, WINDOW_STEP * (past // WINDOW_STEP + 1))
        states = states_of(cache)
        batch, device = states[0].shape[0], states[0].device
        names = layer_names("input", len(cache.layers))
        self._past = [state.new_zeros(*state.shape[:2], self.size, state.shape[3]) for state in states]
        self._inputs: Tensors = {
            "input_ids": torch.zeros(batch, 1, dtype=torch.long, device=device),
            "attention_mask": torch.zeros(batch, self.size + 1, dtype=torch.long, device=device),
            "position_ids": torch.zeros(batch, 1, dtype=torch.long, device=device),
            "logits_to_keep": torch.zeros(1, dtype=torch.long, device=device),
            **dict(zip(names, self._past, strict=True)),
        }
        self._present = layer_names("output", len(cache.layers))
        self._inputs["attention_mask"][:, -1] = 1
        self._outputs = run(self._inputs, None)  # warm-up for the capture; it also allocates the outputs
        self._once = capture(self._advance) if capture is not None else self._advance
        self._length, self._states = past, states
        for buffer, state in zip(self._past, states, strict=True):
            buffer.zero_()
            buffer[:, :, self.size - past :] = state

    def serves(self, cache: Cache) -> bool:
        """Whether the window holds the tensors of `cache` and has space for one more token.

        Beam search replaces the tensors in the same cache object.
        """
        mine = all(state is expected for state, expected in zip(states_of(cache), self._states, strict=True))
        return mine and self._length < self.size

    def step(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor, Cache]:
        """Run one step.

        Args:
            input_ids: New token, `[B, 1]`.
            attention_mask: Mask with ones for real tokens, `[B, P + 1]`.
            position_ids: Position of the new token, `[B, 1]`.

        Returns:
            Logits `[B, 1, V]`, and the cache with the new token: views of the buffers, valid until the next step.
        """
        self._inputs["input_ids"].copy_(input_ids)
        self._inputs["position_ids"].copy_(position_ids)
        mask = self._inputs["attention_mask"]
        mask[:, : mask.shape[1] - attention_mask.shape[1]] = 0
        mask[:, mask.shape[1] - attention_mask.shape[1] :] = attention_mask
        self._once()
        self._length += 1
        return self._outputs["logits"].clone(), self._cache()

    def _advance(self) -> None:
        """Run one pass, then shift the window by one token; its first token, which is masked, is dropped."""
        self._run(self._inputs, self._outputs)
        for buffer, name in zip(self._past, self._present, strict=True):
            buffer.copy_(self._outputs[name][:, :, 1:])

    def _cache(self) -> Cache:
        self._states = [buffer[:, :, self.size - self._length :] for buffer in self._past]
        return cache_of(self._states)
