"""Decode steps whose tensors keep their size and place, as a CUDA graph wants them, over a cache that grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import Cache

from exporters.tracing import cache_of, states_of

Tensors = dict[str, Tensor]
Run = Callable[[Mapping[str, Tensor], Tensors | None], Tensors]
"""Runs one decode step on inputs by name, into outputs by name (None: new ones)."""
Capture = Callable[[Callable[[], None]], Callable[[], object]]
"""Turns a function into one that does the same to the same tensors: the replay of a CUDA graph."""
STEP = 256
"""Windows are multiples of this long: a longer one is made, and captured, every so many tokens."""


def layer_names(side: str, layers: int) -> list[str]:
    """Names of a graph's keys and values, layer by layer.

    Args:
        side: `"input"` or `"output"`.
        layers: How many.

    Returns:
        `input.cache.layers.0.keys`, `input.cache.layers.0.values`, …
    """
    return [f"{side}.cache.layers.{index}.{what}" for index in range(layers) for what in ("keys", "values")]


class FixedWindow:
    """The past of a decode step in buffers of a fixed length: it stands at their end, what is before it is masked.

    Keys carry their rotation already, and the graph's causal and sliding masks see only distances: where in the
    buffer a token stands makes no difference.

    Args:
        run: Runs a step.
        cache: The past so far.
        limit: Longest past that the graph takes; that of `cache` is shorter.
        capture: Captures a step; None runs it each time.
    """

    def __init__(self, run: Run, cache: Cache, limit: int, capture: Capture | None = None) -> None:
        self._run = run
        past = cache.get_seq_length()
        self.size = min(limit, STEP * (past // STEP + 1))
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
        self._outputs = run(self._inputs, None)  # a first run, as capturing asks for; it also sizes the outputs
        self._once = capture(self._advance) if capture is not None else self._advance
        self._length, self._known = past, states
        for buffer, state in zip(self._past, states, strict=True):
            buffer.zero_()
            buffer[:, :, self.size - past :] = state

    def serves(self, cache: Cache) -> bool:
        """Whether `cache` is what the last step returned, or what it began with, and a token more finds room.

        A search by beams puts other tensors into the same cache.
        """
        mine = all(state is known for state, known in zip(states_of(cache), self._known, strict=True))
        return mine and self._length < self.size

    def step(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor, Cache]:
        """Run one step.

        Args:
            input_ids: The new token, `[B, 1]`.
            attention_mask: `[B, P + 1]`.
            position_ids: `[B, 1]`.

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
        """One pass; then the window moves on by a token, its first, which is masked, falls out."""
        self._run(self._inputs, self._outputs)
        for buffer, name in zip(self._past, self._present, strict=True):
            buffer.copy_(self._outputs[name][:, :, 1:])

    def _cache(self) -> Cache:
        self._known = [buffer[:, :, self.size - self._length :] for buffer in self._past]
        return cache_of(self._known)
