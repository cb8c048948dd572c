"""An exported decode graph as a causal language model of transformers: `generate()` by any runtime."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from exporters.tracing import empty_cache, positions


class GraphCausalLM(GenerationMixin):
    """A decode graph that some runtime runs, with the interface of a transformers model.

    A subclass runs the graph in `step`.

    Args:
        config: Of the model that was exported.
        generation_config: Its defaults for `generate()`; None takes those of the configuration.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False

    def __init__(self, config: PreTrainedConfig, generation_config: GenerationConfig | None = None) -> None:
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and outputs lie."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return torch.float32

    def can_generate(self) -> bool:
        """It has `generate()`."""
        return True

    def is_remote_code(self) -> bool:
        """It is not code from a Hub repository."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """No experts: `generate()` asks every model for them."""
        return {}

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache, logits_to_keep: Tensor
    ) -> tuple[Tensor, Cache]:
        """Run the graph once.

        Args:
            input_ids: New tokens, `[B, S]`.
            attention_mask: Ones for real tokens, `[B, P + S]`.
            position_ids: Of the new tokens, `[B, S]`.
            cache: Keys and values of the P tokens before them.
            logits_to_keep: Which of the S positions get logits, `[K]`.

        Returns:
            Logits `[B, K, V]`, and the cache of all P + S tokens.

        Raises:
            NotImplementedError: The subclass lacks it.
        """
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model as a transformers model is run.

        Args:
            input_ids: New tokens, `[B, S]`.
            attention_mask: Ones for real tokens, `[B, P + S]`; None: all are.
            position_ids: Of the new tokens, `[B, S]`; None: counted from the mask.
            cache: Of the P tokens before them; None or an empty one begins a sequence. It is updated in place.
            use_cache: Return the cache.
            logits_to_keep: Only the last that many positions get logits (0: all), or those in a `[K]` tensor.
            **kwargs: Ignored; `generate()` passes what some models take.

        Returns:
            Logits `[B, K, V]` and the cache.
        """
        batch, length = input_ids.shape
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + length, dtype=torch.long, device=input_ids.device)
        if position_ids is None:
            position_ids = positions(attention_mask, length)
        if not isinstance(logits_to_keep, Tensor):
            logits_to_keep = torch.arange(length - logits_to_keep if logits_to_keep else 0, length)
        before = cache if cache is not None and past else empty_cache(self.config, batch, dtype=self.dtype)
        logits, after = self.step(
            input_ids, attention_mask.long(), position_ids.expand(batch, length), before, logits_to_keep
        )
        if cache is not None:
            # In place, as transformers' models do. `generate()` hands over layers that may cut to a sliding window.
            cache.layers = after.layers
            after = cache
        return CausalLMOutputWithPast(logits=cast(torch.FloatTensor, logits), cache=after if use_cache else None)

    __call__ = forward
