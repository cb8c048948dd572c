"""Text that a model writes itself, as windows of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.patching import attending_by_group
from selfpruner_hub.progress import Progress

SAMPLE_BATCH = 64
"""Most sequences that a model samples side by side."""


@torch.inference_mode()
def sample_windows(
    model: PreTrainedModel, count: int, window: int, seed: int, progress: Progress | None = None
) -> Tensor:
    """Let the model write `count` windows of `window` tokens, each from its start token (or a random token).

    Sampling is ancestral (temperature 1, no truncation), so the text is drawn from the model's own distribution.

    Args:
        model: The dense model.
        count: Windows wanted, at least 1.
        window: Tokens per window, at least 1.
        seed: Of the sampling.
        progress: Told how many windows are done.

    Returns:
        Token ids, `[count, window]`.
    """
    config = model.config
    special: set[int] = set()
    for ids in (config.eos_token_id, config.pad_token_id, config.bos_token_id):  # one id, several, or None
        special.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    generator = torch.Generator().manual_seed(seed)
    start = model.config.bos_token_id
    batch = _sample_batch(model, window)
    parts = []
    if progress:
        progress("sampling text", 0, count)
    with torch.random.fork_rng(), attending_by_group(model):
        torch.manual_seed(seed)
        for done in range(0, count, batch):
            size = min(batch, count - done)
            if start is None:
                first = torch.randint(model.config.vocab_size, (size, 1), generator=generator)
            else:
                first = torch.full((size, 1), start)
            first = first.to(model.device)
            # The start token stands before the window; no end token, so that windows fill up.
            out = model.generate(  # type: ignore[operator]
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                min_new_tokens=window,
                max_new_tokens=window,
                suppress_tokens=sorted(special) or None,
                pad_token_id=model.config.pad_token_id or 0,
            )
            parts.append(out[:, 1 : window + 1].cpu())
            if progress:
                progress("sampling text", done + size, count)
    return torch.cat(parts)


def _sample_batch(model: PreTrainedModel, window: int) -> int:
    """As many sequences as keep the KV cache smaller than the weights."""
    shape = shape_of(model.config)
    groups = sum(layer.num_key_value_heads for layer in shape.dense.layers)
    cached = 2 * groups * shape.head_dim * window  # keys and values of one sequence, in numbers
    return max(1, min(SAMPLE_BATCH, model.num_parameters() // cached))
