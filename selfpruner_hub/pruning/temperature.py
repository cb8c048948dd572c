"""Temperature scaling of a pruned model, on text that it was not fitted to (arXiv 1706.04599).

A pruned model is less accurate than its dense model, but its logits spread as widely, so its predictions are too
confident. One factor for all logits corrects this. It is multiplied into the last norm, so nothing is
added to the model, and the order of the predictions does not change.
"""

from __future__ import annotations

import torch
from numpy.polynomial import Polynomial
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.models.architectures import architecture_of
from selfpruner_hub.models.forward import head_chunks, last_hidden_states, softcapped
from selfpruner_hub.progress import Progress

SCALES = tuple(percent / 100 for percent in range(50, 101, 2))
"""Candidate factors, smallest first."""
MEASURED = SCALES[::5]
"""Factors whose divergence is measured. It is smooth in the factor, so a polynomial gives it for the others."""
MATCHING_TOKENS = 4096
"""Maximum number of tokens to choose the factor on; a single number needs few."""


@torch.no_grad()
def match_confidence(
    dense: PreTrainedModel, pruned: PreTrainedModel, windows: Tensor, progress: Progress | None = None
) -> float:
    """Scale the logits, in place, to minimise their KL divergence from the dense model.

    The head of both models runs once, and its logits are scaled by a few factors. The divergence is over the whole
    vocabulary. Over the likeliest tokens only, as in the score of candidates, a model that gives too little probability
    to the other tokens would not be penalised.

    Args:
        dense: The dense model.
        pruned: Its pruned copy.
        windows: Token ids of text that the pruned model was not fitted to, `[N, W]`.
        progress: Callback that receives the number of predictions that are done.

    Returns:
        The factor, one of `SCALES`; 1 leaves the model unchanged.
    """
    read = windows[: max(1, MATCHING_TOKENS // windows.shape[1])]
    theirs, ours = (torch.cat(list(last_hidden_states(model, read))) for model in (dense, pruned))
    crossed = [0.0] * len(MEASURED)  # Σ of cross-entropies, which differ from the divergences by a constant
    for (first, reference), (_, logits) in zip(
        head_chunks(dense, theirs), head_chunks(pruned, ours, capped=False), strict=True
    ):
        shares = reference.softmax(-1)
        for index, scale in enumerate(MEASURED):
            scaled = softcapped(pruned, scale * logits)
            crossed[index] += (scaled.logsumexp(-1) - torch.linalg.vecdot(shares, scaled)).sum().item()
        if progress:
            progress("matching confidence", first + len(logits), len(ours))
    through = Polynomial.fit(MEASURED, crossed, deg=len(MEASURED) - 1)
    scale = min(SCALES, key=through)
    norm, unit = pruned.get_decoder().norm, architecture_of(pruned.config).norm_unit
    norm.weight.copy_(scale * (norm.weight.float() + unit) - unit)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(scale)
    return scale
