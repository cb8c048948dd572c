"""Temperature scaling of a pruned model, on text that it was not fitted to (arXiv 1706.04599).

A pruned model is less accurate than its dense model, but its logits spread as widely, so its predictions are too
confident. One factor for all logits corrects this. It is multiplied into the last norm, so nothing is
added to the model, and the order of the predictions does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from selfpruner_hub.models.architectures import architecture_of
from selfpruner_hub.models.forward import head_chunks, last_hidden_states
from selfpruner_hub.progress import Progress
from selfpruner_hub.pruning.least_squares import first_minimum

SCALES = tuple(percent / 100 for percent in range(50, 101, 2))
"""Candidate factors, smallest first."""
TOKENS = 4096
"""Maximum number of tokens to choose the factor on; a single number needs few."""


@torch.no_grad()
def match_confidence(
    dense: PreTrainedModel, pruned: PreTrainedModel, windows: Tensor, progress: Progress | None = None
) -> float:
    """Scale the logits, in place, to minimise their KL divergence from the dense model.

    The divergence is over the whole vocabulary. Over the likeliest tokens only, as in the score of candidates, a model
    that gives too little probability to the other tokens would not be penalised.

    Args:
        dense: The dense model.
        pruned: Its pruned copy.
        windows: Token ids of text that the pruned model was not fitted to, `[N, W]`.
        progress: Callback that receives the number of factors that are done; most factors are skipped.

    Returns:
        The factor, one of `SCALES`; 1 leaves the model unchanged.
    """
    few = windows[: max(1, TOKENS // windows.shape[1])]
    theirs, ours = (torch.cat(list(last_hidden_states(model, few))) for model in (dense, pruned))

    def diverged(scale: float) -> float:
        pairs = zip(head_chunks(dense, theirs), head_chunks(pruned, scale * ours), strict=True)
        logs = ((p.log_softmax(-1), q.log_softmax(-1)) for (_, p), (_, q) in pairs)
        total = sum(kl_div(q, p, reduction="sum", log_target=True).item() for p, q in logs)
        if progress:
            progress("matching confidence", len(SCALES) - SCALES.index(scale), len(SCALES))
        return total

    scale = first_minimum(reversed(SCALES), diverged)
    if progress:
        progress("matching confidence", len(SCALES), len(SCALES))
    norm, unit = pruned.get_decoder().norm, architecture_of(pruned.config).norm_unit
    norm.weight.copy_(scale * (norm.weight.float() + unit) - unit)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(scale)
    return scale
