"""transformers' `generate()` for an exported decode graph, in any runtime."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from exporters.tracing import empty_cache, positions


class GraphCausalLM(GenerationMixin):
    """A decode graph with the interface of a transformers causal language model.

    A subclass runs the graph in `step`.

    Args:
        config: Configuration of the exported model.
        generation_config: Defaults of `generate()`; None takes the defaults of `config`.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False

    def __init__(self, config: PreTrainedConfig, generation_config: GenerationConfig | None = None) -> None:
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)

    @property
    def device(self) -> torch.device:
        """Device of the inputs and outputs."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return torch.float32

    def can_generate(self) -> bool:
        """Return True: the model has `generate()`."""
        return True

    def is_remote_code(self) -> bool:
        """Return False: this is no code from a Hub repository."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Return nothing: the model has no experts, but `generate()` asks every model for them."""
        return {}

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache, logits_to_keep: Tensor
    ) -> tuple[Tensor, Cache]:
        """Run the graph once.

        Args:
            input_ids: New tokens, `[B, S]`.
            attention_mask: Mask with ones for real tokens, `[B, P + S]`.
            position_ids: Positions of the new tokens, `[B, S]`.
            cache: Keys and values of the P tokens before them.
            logits_to_keep: Indices of the positions that get logits, `[K]`, each below S.

        Returns:
            Logits `[B, K, V]`, and the cache of all P + S tokens.

        Raises:
            NotImplementedError: The subclass does not define it.
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
        """Run the model with the arguments of a transformers model.

        Args:
            input_ids: New tokens, `[B, S]`.
            attention_mask: Mask with ones for real tokens, `[B, P + S]`; None means all ones.
            position_ids: Positions of the new tokens, `[B, S]`; None counts them from the mask.
            cache: Cache of the P tokens before them, updated in place; None or an empty one begins a sequence.
            use_cache: Flag to return the cache.
            logits_to_keep: Number of last positions that get logits (0: all), or a `[K]` tensor of positions.
            **kwargs: Ignored arguments that `generate()` passes for other models.

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
            # In place, as transformers' models do. The layers that `generate()` passes may cut to a sliding window.
            cache.layers = after.layers
            after = cache
        return CausalLMOutputWithPast(logits=cast(torch.FloatTensor, logits), cache=after if use_cache else None)

    __call__ = forward
