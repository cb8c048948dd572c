"""Which channels and KV groups go first: scores from weights and calibration statistics, and the order they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.architectures import architecture_of, decoder_layers, linear, shape_of
from selfpruner_hub.calibration import LayerStatistics, Moments
from selfpruner_hub.corpus import Progress
from selfpruner_hub.errors import UserError


def wanda_sp(weight: Tensor, moments: Moments) -> Tensor:
    """Σ_i |W_ij| · ‖x_j‖₂, up to the token count (Wanda, arXiv 2306.11695, summed over outputs as in FLAP's -sp)."""
    return weight.abs().sum(0) * moments.energy.clamp_min(0).sqrt()


def flap(weight: Tensor, moments: Moments) -> Tensor:
    """Var(x_j) · ‖W_:,j‖² (FLAP, arXiv 2312.11983)."""
    return moments.variance * weight.square().sum(0)


def energy(weight: Tensor, moments: Moments) -> Tensor:
    """E[x_j²] · ‖W_:,j‖²: the expected squared output of column j."""
    return moments.energy * weight.square().sum(0)


SCORES: dict[str, Callable[[Tensor, Moments], Tensor]] = {"wanda-sp": wanda_sp, "flap": flap, "energy": energy}
"""Column scores: weight `[out, in]` and the moments of its input to `[in]`, greater is more important."""


@dataclass(frozen=True)
class LayerOrder:
    """Dense indices, most important first.

    Attributes:
        groups: KV groups, `[G]`, int64.
        channels: FFN channels, `[F]`, int64.
    """

    groups: Tensor
    channels: Tensor

    def inverse(self) -> LayerOrder:
        """The order that undoes this one."""
        return LayerOrder(self.groups.argsort(), self.channels.argsort())


@torch.inference_mode()
def rank(model: PreTrainedModel, statistics: Sequence[LayerStatistics], score: str = "wanda-sp") -> list[LayerOrder]:
    """Order every layer's KV groups and FFN channels by importance.

    A KV group's score is the sum over its columns of o_proj.

    Args:
        model: The dense model.
        statistics: What `calibrate` returned for it.
        score: A key of `SCORES`.

    Returns:
        One `LayerOrder` per layer.

    Raises:
        UserError: The score is unknown.
    """
    if score not in SCORES:
        raise UserError(f"Unknown importance {score!r}.", f"Choose one of: {', '.join(SCORES)}.")
    architecture = architecture_of(model.config)
    orders = []
    for layer, known, dense in zip(decoder_layers(model), statistics, shape_of(model.config).dense.layers, strict=True):
        columns = SCORES[score](linear(layer, architecture.attention_output).weight.float(), known.attention)
        channels = SCORES[score](linear(layer, architecture.ffn_output).weight.float(), known.ffn)
        groups = columns.view(dense.num_key_value_heads, -1).sum(1)
        orders.append(
            LayerOrder(
                groups.argsort(descending=True, stable=True),
                channels.argsort(descending=True, stable=True),
            )
        )
    return orders


def output_sensitivity(
    model: PreTrainedModel, windows: Tensor, seed: int = 0, progress: Progress | None = None
) -> list[tuple[float, float]]:
    """How much the loss minds noise on the outputs of each layer's attention and FFN: the trace of their Fisher.

    Labels are drawn from the model's own distribution, so that E‖∂L/∂y‖² is the trace of the Fisher information of y
    and ½ · E‖∂L/∂y‖² / D · E‖δy‖² is the second-order KL divergence of an isotropic error δy. One backward pass.

    Args:
        model: The dense model.
        windows: Token ids, `[N, W]`; a few thousand tokens are enough.
        seed: Of the drawn labels.
        progress: Told how many windows are done.

    Returns:
        Per layer, E‖∂L/∂y‖² / D for the attention's and the FFN's output, per token.
    """
    architecture = architecture_of(model.config)
    modules = [
        linear(layer, path)
        for layer in decoder_layers(model)
        for path in (architecture.attention_output, architecture.ffn_output)
    ]
    sums = [0.0] * len(modules)

    def watch(index: int) -> Callable[..., None]:
        def keep(gradient: Tensor) -> None:
            sums[index] += gradient.float().square().mean(-1).sum().item()

        return lambda _module, _inputs, output: output.register_hook(keep) and None

    handles = [module.register_forward_hook(watch(i)) for i, module in enumerate(modules)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:  # the gradients of the weights are not wanted, and take as much memory as they do
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    try:
        for done, window in enumerate(windows, 1):
            embedded = model.get_input_embeddings()(window[None].to(model.device)).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
            if progress:
                progress("sensitivities", done, len(windows))
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    means = [value / windows.numel() for value in sums]
    return list(zip(means[::2], means[1::2], strict=True))
