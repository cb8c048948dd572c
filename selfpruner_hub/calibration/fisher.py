"""Fisher information of the outputs of each layer's attention and FFN, measured one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub import ranks
from selfpruner_hub.calibration.ridge import damped_factor
from selfpruner_hub.calibration.sums import add_gram
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.models.forward import draw, head_gradient
from selfpruner_hub.models.layer_stream import backward_by_layer
from selfpruner_hub.models.patching import frozen
from selfpruner_hub.models.placement import placed
from selfpruner_hub.storage.run import DEFAULT_RUN, Run

Fisher = Sequence[tuple[Tensor | None, Tensor | None]]
"""Per layer, R of the attention output and of the FFN output, `[H, H]`: RᵀR is the Fisher information; None means I."""

DAMPING = 0.1
"""Damping of the Fisher information, in units of its mean diagonal, for directions that few tokens have measured."""


def output_fisher(
    model: PreTrainedModel,
    windows: Tensor,
    run: Run = DEFAULT_RUN,
) -> list[tuple[Tensor, Tensor]]:
    """Measure the Fisher information of the outputs of each layer's attention and FFN.

    Labels are drawn from the model's own distribution. So F = E[g gᵀ], with g = ∂L/∂y of an output y, is the Fisher
    information of y, and an error δ of y causes a KL divergence of ½ E[δᵀ F δ] to second order. The forward pass keeps
    the inputs of each layer; the backward pass runs one layer at a time again.

    Memory: 8 · H² bytes per layer, one hidden state per token and layer, and the activations of one layer.

    Args:
        model: The dense model.
        windows: Token ids, `[N, W]`; a few thousand tokens are enough.
        run: Run context: its random seed draws the labels, its checkpoints keep the matrices.

    Returns:
        Per layer, R of the attention output and of the FFN output, `[H, H]`, float32: RᵀR = F + λ · mean(diag F) · I
        with λ = `DAMPING`, so ½ ‖R δ‖² is that divergence in nats per token.

    Raises:
        ModelError: The activations or their gradients are not finite, or an output does not affect the loss.
    """
    architecture, layers = architecture_of(model.config), decoder_layers(model)
    paths = (architecture.attention_output, architecture.ffn_output)
    store, checkpoints = run.store, run.checkpoints
    if finished := _finished(len(layers), model.device, run):
        return finished
    share = ranks.share(len(windows))
    generator = torch.Generator(model.device)

    def drawn(logits: Tensor, _first: int) -> Tensor:
        return nn.functional.cross_entropy(logits, draw(logits.detach(), 1.0, generator), reduction="sum")

    def last(first: int, hidden: Tensor) -> Tensor:
        """The head runs one window at a time; each has random numbers of its own, whichever process reads it."""
        gradients = []
        for number, each in enumerate(hidden, share.start + first):
            generator.manual_seed((run.seed << 32) + number)
            gradients.append(head_gradient(model, each, drawn))
        return torch.stack(gradients)

    def outputs(layer: nn.Module) -> list[nn.Module]:
        return [linear(layer, path) for path in paths]

    roots: list[tuple[Tensor, Tensor]] = []
    with frozen(model):
        for index, layer, batches in backward_by_layer(model, windows[share], last, outputs, store):
            with placed(layer, model.device):
                sums = _products(batches)
                ranks.total(*sums)
            first, second = (damped_factor(each.div_(windows.numel()), DAMPING).t().contiguous() for each in sums)
            checkpoints.save(f"fisher-{index}", {"attention": first, "ffn": second})
            roots.append((store(first), store(second)))
            run.progress("sensitivities", len(roots), len(layers))
    return roots[::-1]


def _products(batches: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Σ g gᵀ of each module's output."""
    sums: list[Tensor] = []
    for gradients in batches:
        sums = sums or [torch.zeros(2 * each.shape[-1:], dtype=torch.float32, device=each.device) for each in gradients]
        for total, gradient in zip(sums, gradients, strict=True):
            g = gradient.flatten(0, -2)
            add_gram(total, g)
    return sums


def _finished(layers: int, device: torch.device, run: Run) -> list[tuple[Tensor, Tensor]] | None:
    """Load the matrices of a finished pass; None if the pass is not finished (it ends at the first layer)."""
    roots = []
    for index in range(layers):
        tensors = run.checkpoints.load(f"fisher-{index}", device)
        if tensors is None:
            return None
        roots.append((run.store(tensors["attention"]), run.store(tensors["ffn"])))
    return roots


def roots_of(fisher: Fisher | None, layers: int, device: torch.device) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Yield R of every layer's outputs on a device; without Fisher information, None: all errors have equal weight."""
    for attention, ffn in fisher or [(None, None)] * layers:
        yield None if attention is None else attention.to(device), None if ffn is None else ffn.to(device)
