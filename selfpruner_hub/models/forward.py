"""Forward passes in batches: choose the batch size, run the decoder, and run the head on blocks of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.architectures import logit_scale

BATCH_TOKENS = 2048
"""Number of tokens in one forward pass of the decoder on a CPU."""
HEAD_TOKENS = 128
"""Number of positions whose logits are in memory at once, in float32: 128 × vocabulary."""
Loss = Callable[[Tensor, int], Tensor]
"""(float32 logits `[P, V]`, index of the first of these predictions) → their summed loss, a scalar."""

LESS = 0.75
"""Factor on the number of windows after a pass that ran out of memory."""
ON_ACCELERATORS = 16
"""Factor on the number of tokens for the first attempt on an accelerator."""

_known: WeakKeyDictionary[PreTrainedModel, dict[int, int]] = WeakKeyDictionary()


@torch.inference_mode()
def windows_at_once(model: PreTrainedModel, width: int, tokens: int) -> int:
    """Choose the number of windows in one forward pass of the decoder.

    On an accelerator, the number is found by trial, once per width, with the current layers of the model: on
    out-of-memory, retry with 10 % fewer windows. Candidates use the same number; `last_hidden_states` lowers it where
    their own weights leave too little memory.

    Args:
        model: A causal language model.
        width: Number of tokens per window.
        tokens: Number of tokens in one pass on a CPU.

    Returns:
        Number of windows, at least 1.

    Raises:
        ModelError: Not even one window fits.
    """
    if model.device.type == "cpu":
        return max(1, tokens // width)
    sizes = _known.setdefault(model, {})
    if width not in sizes:

        def tried(windows: int) -> int:
            model.get_decoder()(torch.zeros(windows, width, dtype=torch.long, device=model.device), use_cache=False)
            return windows

        try:
            sizes[width] = find_executable_batch_size(tried, max(1, ON_ACCELERATORS * tokens // width))()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            raise ModelError(
                f"Not one window of {width} tokens fits in the memory of {model.device}.",
                "Use shorter windows, or offload_folder (--offload): one layer at a time is then on the device.",
            ) from error
    return sizes[width]


def check_ids(model: PreTrainedModel, largest: int) -> None:
    """Check that a model has embeddings for all token ids of a text, before any pass reads them.

    Args:
        model: A causal language model.
        largest: Largest token id.

    Raises:
        ModelError: There are fewer embeddings.
    """
    count = len(cast(Tensor, model.get_input_embeddings().weight))
    if largest >= count:
        raise ModelError(
            f"The text has token {largest}, and the model has embeddings of tokens 0 to {count - 1} alone.",
            "Give the tokenizer that belongs to the model.",
        )


def last_hidden_states(model: PreTrainedModel, windows: Tensor, counted: Tensor | None = None) -> Iterator[Tensor]:
    """Run the decoder on a few windows at a time.

    Args:
        model: A causal language model.
        windows: Token ids, `[N, W]`.
        counted: Mask of the predictions that count, `[N, W - 1]`, bool; None counts all.

    Yields:
        Last hidden states, `[P, H]`, at the positions whose predictions count; the last position of a window has none.
    """
    width, first = windows.shape[1], 0
    while first < len(windows):
        size = windows_at_once(model, width, BATCH_TOKENS)
        batch = windows[first : first + size].to(model.device)
        try:
            hidden = model.get_decoder()(batch, use_cache=False).last_hidden_state[:, :-1]
        except torch.OutOfMemoryError:  # a candidate brings weights of its own, which were not there at the trial
            if size == 1:
                raise
            _known[model][width] = max(1, int(LESS * size))
            torch.accelerator.empty_cache()
            continue
        yield hidden.flatten(0, 1) if counted is None else hidden[counted[first : first + size].to(hidden.device)]
        first += size


def head_chunks(model: PreTrainedModel, hidden: Tensor, *, capped: bool = True) -> Iterator[tuple[int, Tensor]]:
    """Run the language-model head on blocks of positions.

    Args:
        model: A causal language model.
        hidden: Last hidden states, `[P, H]`.
        capped: Whether to apply `softcapped`.

    Yields:
        The index of the first position, and the block's float32 logits `[≤ HEAD_TOKENS, V]`.
    """
    head, scale = model.get_output_embeddings(), logit_scale(model.config)
    for first in range(0, len(hidden), HEAD_TOKENS):
        logits = scale * head(hidden[first : first + HEAD_TOKENS]).float()
        yield first, softcapped(model, logits) if capped else logits


def softcapped(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Cap logits as the model does, if it does (Gemma 2)."""
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Sample one token per row by inverse transform sampling; `torch.multinomial` would use only one core.

    Args:
        logits: Logits, `[N, V]`, float32.
        temperature: Sampling temperature, at least 0; 0 takes the likeliest token.
        generator: Random generator on the device of the logits.

    Returns:
        Token ids, `[N]`, int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits / temperature).softmax(-1).cumsum(-1)
    point = (
        torch.rand(len(logits), 1, generator=generator, dtype=cumulated.dtype, device=logits.device) * cumulated[:, -1:]
    )
    return torch.searchsorted(cumulated, point, right=True)[:, 0].clamp_max(logits.shape[1] - 1)


def head_gradient(model: PreTrainedModel, hidden: Tensor, loss: Loss, first: int = 0) -> Tensor:
    """Compute the gradient of a loss with respect to the last hidden states; the head runs on blocks of positions.

    Args:
        model: A causal language model.
        hidden: Last hidden states, `[P, H]`.
        loss: Loss, summed over positions.
        first: Index of the first position, for the loss.

    Returns:
        Gradient, `[P, H]`.
    """
    leaf = hidden.requires_grad_()
    for number, logits in head_chunks(model, leaf):
        loss(logits, first + number).backward()
    return cast(Tensor, leaf.grad)
