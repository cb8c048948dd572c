"""Fisher information of the outputs of each layer's attention and FFN, measured one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.calibration.ridge import damped_factor
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.models.forward import Loss, draw, head_gradient
from selfpruner_hub.models.layer_stream import Seen, Stream, check_finite
from selfpruner_hub.models.patching import add_gram, frozen, replaced
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
    if known := _finished(layers, run):
        return known
    generator = torch.Generator(model.device).manual_seed(run.seed)

    def drawn(logits: Tensor, _first: int) -> Tensor:
        return nn.functional.cross_entropy(logits, draw(logits.detach(), 1.0, generator), reduction="sum")

    roots: list[tuple[Tensor, Tensor]] = []
    with frozen(model):
        stream = Stream(model, windows, store)
        read = []
        for index, layer in enumerate(layers):
            read.append([store(hidden.clone()) for hidden in stream.hidden])
            with torch.no_grad():
                stream.advance(index, layer)
        check_finite(stream.hidden)
        batches = windows.split(len(stream.hidden[0]))
        gradients = [store(_behind(model, *each, drawn)) for each in zip(batches, stream.hidden, strict=True)]
        for index, layer in reversed(list(enumerate(layers))):
            stream.hidden = read.pop()
            sums = _products(stream, index, layer, [linear(layer, path) for path in paths], gradients)
            first, second = (damped_factor(each.div_(windows.numel()), DAMPING).t().contiguous() for each in sums)
            checkpoints.save(f"fisher-{index}", {"attention": first, "ffn": second})
            roots.append((store(first), store(second)))
            run.progress("sensitivities", len(roots), len(layers))
    return roots[::-1]


def _finished(layers: nn.ModuleList, run: Run) -> list[tuple[Tensor, Tensor]] | None:
    """Load the matrices of a finished pass; None if the pass is not finished (it ends at the first layer)."""
    roots = []
    for index, layer in enumerate(layers):
        found = run.checkpoints.load(f"fisher-{index}", next(layer.parameters()).device)
        if found is None:
            return None
        roots.append((run.store(found["attention"]), run.store(found["ffn"])))
    return roots


def _behind(model: PreTrainedModel, batch: Tensor, hidden: Tensor, loss: Loss) -> Tensor:
    """Gradient of the loss with respect to the last layer's output, `[B, W, H]`; the head runs one window at a time."""
    leaf = hidden.detach().requires_grad_()
    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(replaced(layer, "forward", lambda *_args, **_kwargs: leaf))
        last = model.get_decoder()(batch.to(model.device), use_cache=False).last_hidden_state
    last.backward(torch.stack([head_gradient(model, each.detach(), loss) for each in last]))
    return cast(Tensor, leaf.grad)


def _products(
    stream: Stream, index: int, layer: nn.Module, modules: list[nn.Linear], gradients: list[Tensor]
) -> list[Tensor]:
    """Σ g gᵀ of the modules' outputs; replaces `gradients` of the layer's output by those of its input, in place."""
    sums = [torch.zeros(2 * module.weight.shape[:1], device=module.weight.device) for module in modules]
    for number, hidden in enumerate(stream.hidden):
        leaf = stream.hidden[number] = hidden.detach().requires_grad_()
        outputs = [Seen(module) for module in modules]
        after = cast(Tensor, stream.run(index, layer, number, outputs))
        back, *found = torch.autograd.grad(after, [leaf, *(each.output for each in outputs)], gradients[number])
        for total, gradient in zip(sums, found, strict=True):
            g = gradient.flatten(0, -2)
            add_gram(total, g)
        gradients[number].copy_(back)  # at the end, because `found` may contain the same tensor
    return sums


def roots_of(fisher: Fisher | None, layers: int) -> Fisher:
    """R of every layer's outputs; without Fisher information, None for each, so all errors have equal weight."""
    return fisher or [(None, None)] * layers
