"""The importance matrix of llama.cpp: how large the inputs are that each column of a weight multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.corpus import Corpus, load_corpus
from selfpruner_hub.calibration.text_sources import sources_of
from selfpruner_hub.models.architectures import architecture_of, decoder_layers
from selfpruner_hub.models.forward import last_hidden_states

TOKENS, WINDOW = 8192, 512
"""Tokens of text, and of one window of it."""
LEAST = 1e-6
"""Least importance of a column, relative to the mean; a block in which no column counts would lose its weights."""
Importance = dict[tuple[int, str], Tensor]
"""Mean squares of a projection's inputs, float32, `[columns]`, by index of the layer and path within it."""


@torch.inference_mode()
def importance_matrix(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, data: str, tokens: int = TOKENS
) -> Importance:
    """Measure the mean square of what the columns of every layer's projections multiply.

    Args:
        model: Dense or pruned model.
        tokenizer: Its tokenizer.
        data: Text, as `AutoPruner.prune` takes it: `"self"`, `"wikitext2"`, a path, several with `+` between them, …
        tokens: Number of tokens of text.

    Returns:
        The mean squares, positive.

    Raises:
        DataError: The text is unknown, unreadable or too short.
    """
    sources, window = sources_of(data), min(WINDOW, model.config.max_position_embeddings)
    share = -(-tokens // len(sources))
    windows = Corpus.mixed(
        [load_corpus(source, tokenizer, tokens=share, window=window, model=model) for source in sources], seed=0
    ).windows
    architecture = architecture_of(model.config)
    paths = (*(p.path for p in architecture.inputs), architecture.attention_output, architecture.ffn_output)
    sums: Importance = {}

    def adds(key: tuple[int, str]) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            squares = inputs[0].float().square().flatten(0, -2).sum(0)
            sums[key] = sums[key] + squares if key in sums else squares

        return add

    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(adds((index, path)))
        for index, layer in enumerate(decoder_layers(model))
        for path in paths
    ]
    try:
        for _ in last_hidden_states(model, windows):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    means = {key: total / windows.numel() for key, total in sums.items()}
    return {key: mean.clamp_min(LEAST * float(mean.mean())) for key, mean in means.items()}
