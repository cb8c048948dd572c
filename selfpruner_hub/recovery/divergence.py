"""The loss of recovery: divergence from the parent, and its gradient, without all logits in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from selfpruner_hub.calibration.sums import add_product
from selfpruner_hub.models.architectures import logit_scale
from selfpruner_hub.ranks import averaged

BLOCK_BYTES = 64 << 20
"""Memory of a block of float32 logits; a few such blocks are alive at a time."""


class Head:
    """The language-model head of a model, on blocks of positions.

    Args:
        model: A causal language model.
        dtype: Dtype of the products.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.module: Any = model.get_output_embeddings()
        self.scale = logit_scale(model.config)
        self.cap: float | None = getattr(model.config, "final_logit_softcapping", None)

    @property
    def weight(self) -> Tensor:
        """Weight in the dtype of the products, `[V, H]`, without a gradient."""
        return cast(Tensor, self.module.weight.detach().to(self.dtype))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits in float32.

        Args:
            hidden: Last hidden states, `[P, H]`.
            weight: `weight`, which is converted once for all blocks.

        Returns:
            Logits, `[P, V]`.
        """
        bias = self.module.bias
        raw = self.scale * F.linear(hidden.to(weight.dtype), weight).float()
        if bias is not None:
            raw += self.scale * bias.float()
        return raw if self.cap is None else (raw / self.cap).tanh_().mul_(self.cap)


def distillation_loss(hidden: Tensor, head: Head, their_hidden: Tensor, their_head: Head) -> Tensor:
    """Mean of KL(parent ‖ pruned model) at temperature 1 over the whole vocabulary.

    The logits and their gradient are computed on blocks of positions, as in Liger kernels (arXiv 2410.10989).

    Args:
        hidden: Last hidden states of the pruned model, `[P, H]`; the gradient reaches them.
        head: Head of the pruned model; the gradient reaches its weight, where that is trained.
        their_hidden: Last hidden states of the parent, `[P, H']`.
        their_head: Head of the parent.

    Returns:
        The mean in nats. With several processes, it is the sum of this process over the average number of positions of
        a process: its average over the processes is the mean over the positions of all.
    """
    return _Distillation.apply(  # type: ignore[no-untyped-call]
        hidden, head.module.weight, head, their_hidden, their_head
    )


class _Distillation(torch.autograd.Function):
    """Computes the gradients in the forward pass, block by block, and scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: Head,
        their_hidden: Tensor,
        their_head: Head,
    ) -> Tensor:
        ours, theirs, states = head.weight, their_head.weight, hidden.to(head.dtype)
        to_hidden = torch.empty_like(hidden, dtype=torch.float32)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        size = max(1, BLOCK_BYTES // (4 * len(weight)))
        total = hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, len(hidden), size):
            rows = slice(first, first + size)
            target = their_head.logits(their_hidden[rows], theirs).log_softmax(-1)
            logits = head.logits(states[rows], ours)
            slope = None if head.cap is None else 1 - (logits / head.cap).square()
            log_shares = logits.log_softmax(-1)
            target_shares = target.exp()
            total += torch.linalg.vecdot(target_shares, target - log_shares).sum()
            gradient = log_shares.exp_().sub_(target_shares).mul_(head.scale)
            if slope is not None:
                gradient.mul_(slope)
            gradient = gradient.to(head.dtype)
            to_hidden[rows] = (gradient @ ours).float()
            if to_weight is not None:
                add_product(to_weight, gradient, states[rows])
        positions = averaged(total.new_tensor(len(hidden)))
        to_hidden /= positions
        if to_weight is not None:
            to_weight /= positions
        ctx.gradients = to_hidden.to(hidden.dtype), None if to_weight is None else to_weight.to(weight.dtype)
        return total / positions

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight = ctx.gradients
        del ctx.gradients
        return to_hidden.mul_(scale), None if to_weight is None else to_weight.mul_(scale), *(None,) * 3


def distilled(
    model: nn.Module,
    student: PreTrainedModel,
    parent: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Run both models on a batch, and compare them.

    Args:
        model: The student, or what wraps it.
        student: The student.
        parent: Its parent.
        inputs: A batch of `Windows`.
        dtype: Dtype of the products.

    Returns:
        What `distillation_loss` returns.
    """
    ids, counted = inputs["input_ids"], inputs["counted"].bool()
    with torch.no_grad():
        theirs = parent.get_decoder()(ids, use_cache=False).last_hidden_state[:, :-1][counted]
    losses: list[Tensor] = []

    def compare(hidden: Tensor) -> None:
        heads = Head(student, dtype), Head(parent, dtype)
        losses.append(distillation_loss(hidden[:, :-1][counted], heads[0], theirs, heads[1]))

    with before_head(student, compare):
        model(input_ids=ids, use_cache=False)
    return losses[0]


@contextmanager
def before_head(model: PreTrainedModel, read: Callable[[Tensor], None]) -> Iterator[None]:
    """Read what the head is about to read, and let it compute the logits of the last position alone.

    So the model's own forward pass runs, with the hooks of whatever wraps it, and no block of tokens × vocabulary is
    made. At that moment the weight of the head is whole, also where FSDP divides it between processes.

    Args:
        model: A causal language model.
        read: Function that receives the last hidden states, `[B, W, H]`; it runs without autocast.

    Yields:
        Nothing.
    """

    def hook(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        with torch.autocast(given[0].device.type, enabled=False):
            read(given[0])
        return (given[0][:, -1:],)

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
