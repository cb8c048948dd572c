"""The confidence of a pruned model: as sure of itself as its parent is, on text that it was not fitted to.

A pruned model knows less than its parent, but its logits spread as widely: it errs with too much confidence. One factor
for all logits mends that (temperature scaling, arXiv 1706.04599); it becomes part of the gain of the last norm, so that
nothing is added to the model, and what it ranks first stays first.
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
"""Factors to choose from, smallest first."""
TOKENS = 8192
"""Most tokens that it is chosen on: it is one number."""


@torch.no_grad()
def match_confidence(
    dense: PreTrainedModel, pruned: PreTrainedModel, windows: Tensor, progress: Progress | None = None
) -> float:
    """Scale the logits so that they diverge least from those of the dense model; in place.

    The divergence is that of the whole vocabulary: over the likeliest tokens alone, as candidates are scored, a model
    that gives the others too little goes unpunished.

    Args:
        dense: The dense model.
        pruned: Its pruned copy.
        windows: Token ids that it was not fitted to, `[N, W]`.
        progress: Told how many factors are done with; most are not tried.

    Returns:
        The factor, one of `SCALES`; 1 leaves the model as it was.
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
    weight, unit = pruned.get_decoder().norm.weight, architecture_of(pruned.config).norm_unit
    weight.copy_(scale * (weight.float() + unit) - unit)
    return scale
