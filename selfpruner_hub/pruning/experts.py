"""Order of importance of the experts of each layer, and the error of its output with fewer of them.

When an expert goes, its tokens are routed again among the experts that are left. What this changes in the output of the
layer is computed, not fitted: one pass over a few thousand tokens gives the output of every expert for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.calibration.fisher import Fisher, roots_of
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import decoder_layers, experts_of, shape_of
from selfpruner_hub.models.devices import ieee_products, summed
from selfpruner_hub.models.layer_stream import Seen, Stream, check_finite
from selfpruner_hub.models.mixtures.routing import Routing, expert_output, routing_of
from selfpruner_hub.models.mixtures.table import Experts
from selfpruner_hub.models.placement import placed
from selfpruner_hub.plans.predicted_loss import LossCurves
from selfpruner_hub.pruning.importance import LayerOrder
from selfpruner_hub.storage.run import DEFAULT_RUN, Run

ORDER_TOKENS = 8_192
"""Maximum number of tokens that are routed again; every expert runs on each of them."""
SKETCH = 96
"""Number of random directions on which outputs are compared; more hidden dimensions than this are projected to them,
which keeps squared distances (Johnson and Lindenstrauss)."""
ExpertScore = Callable[[Tensor, Tensor], Tensor]
"""(gates `[T, E]`, lengths of the experts' outputs `[T, E]`) → importance of each expert, `[E]`."""


def frequency(gates: Tensor, _lengths: Tensor) -> Tensor:
    """Number of tokens that are routed to an expert."""
    return (gates > 0).sum(0)


def reap(gates: Tensor, lengths: Tensor) -> Tensor:
    """Mean of g ‖f‖ over the tokens that are routed to an expert (REAP, arXiv 2510.13999)."""
    return (gates * lengths).sum(0) / (gates > 0).sum(0).clamp_min(1)


def reap_sum(gates: Tensor, lengths: Tensor) -> Tensor:
    """Sum of g ‖f‖ over all tokens: REAP, times the number of tokens that are routed to an expert."""
    return (gates * lengths).sum(0)


SCORES: dict[str, ExpertScore] = {"frequency": frequency, "reap": reap, "reap-sum": reap_sum}
"""Importance of experts by name. An order that removes, step by step, the expert without which the output changes least
was no better than reap-sum on five trained mixtures (`benchmarks/experts.py` of commit 0a6a36a)."""


@torch.inference_mode()
@ieee_products()
def rank_experts(
    model: PreTrainedModel,
    windows: Tensor,
    importance: str = "reap-sum",
    fisher: Fisher | None = None,
    run: Run = DEFAULT_RUN,
) -> tuple[list[LayerOrder], list[LossCurves]]:
    """Order every layer's experts by importance, and predict the loss of each layer with fewer of them.

    Memory: one hidden state per token, and for one layer `SKETCH` numbers per token and expert.

    Args:
        model: The mixture, before it is cut.
        windows: Token ids of the calibration text, `[N, W]`; only the first `ORDER_TOKENS` tokens are read.
        importance: One of `SCORES`.
        fisher: Result of `fisher.output_fisher`; None weights all errors of an output equally.
        run: Run context; its checkpoints keep finished layers, and its seed draws the directions.

    Returns:
        Per layer, the order, and the predicted loss by the number of experts that are kept: half the expected squared
        error of the output, in nats per token with the Fisher information.

    Raises:
        UserError: The importance is unknown.
        ModelError: The activations are not finite.
    """
    if importance not in SCORES:
        raise UserError(f"Unknown importance {importance!r} of experts.", f"Choose one of: {', '.join(SCORES)}.")
    layers, shape, store = decoder_layers(model), shape_of(model.config), run.store
    orders: list[LayerOrder] = []
    curves: list[LossCurves] = []
    stream = Stream(model, windows[: max(1, ORDER_TOKENS // windows.shape[1])], store)
    for index, (_, root) in enumerate(roots_of(fisher, len(layers), model.device)):
        done = run.checkpoints.load(f"experts-{index}")
        with placed(layers[index], model.device):
            if done is None:
                done = dict(zip(("order", "errors"), _ranked(model, index, stream, importance, root, run), strict=True))
                run.checkpoints.save(f"experts-{index}", done)
            else:
                stream.advance(index, layers[index])
        groups = shape.dense.layers[index].num_key_value_heads
        orders.append(LayerOrder(torch.arange(groups), done["order"]))
        curves.append(LossCurves(np.zeros(groups + 1), (done["errors"] / 2).double().numpy()))
        run.progress("ordering", index + 1, len(layers))
    return orders, curves


def _ranked(
    model: PreTrainedModel, index: int, stream: Stream, importance: str, root: Tensor | None, run: Run
) -> tuple[Tensor, Tensor]:
    """The order of a layer's experts, `[E]`, and the error by the number kept, `[E + 1]`; advances the stream."""
    layer, row = decoder_layers(model)[index], experts_of(model.config)
    if not row.placed(model.config, index):
        stream.advance(index, layer)
        return torch.zeros(0, dtype=torch.long), torch.zeros(1)
    read = []
    for number, hidden in enumerate(stream.hidden):
        seen = Seen(layer.get_submodule(row.block))
        after = stream.run(index, layer, number, [seen])
        read.append(seen.input.flatten(0, -2))
        hidden.copy_(cast(Tensor, after))
    x = torch.cat(read)
    check_finite([x])
    routing = routing_of(row, model.config, layer, x)
    outputs, lengths = _outputs(row, layer, x, _directions(root, x.shape[1], run.seed + index, x.device))
    everyone = torch.ones(lengths.shape[1], dtype=torch.bool, device=x.device)
    order = SCORES[importance](routing.gates(everyone), lengths).argsort(descending=True, stable=True)
    return order.cpu(), errors_by_count(routing, outputs, order)


def _directions(root: Tensor | None, size: int, seed: int, device: torch.device) -> Tensor | None:
    """RᵀS, `[H, r]`, with random S where H is large: ‖(RᵀS)ᵀ δ‖² estimates ‖R δ‖². None for the identity."""
    if size <= SKETCH:
        return None if root is None else root.t()
    drawn = torch.randn(size, SKETCH, generator=torch.Generator().manual_seed(seed)).to(device) / SKETCH**0.5
    return drawn if root is None else root.t() @ drawn


def _outputs(row: Experts, layer: nn.Module, x: Tensor, directions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs of all experts along the directions, `[T, E, r]`, and their lengths, `[T, E]`, in float32."""
    experts = layer.get_submodule(row.block).get_submodule("experts")
    count = int(experts.num_experts)  # type: ignore[arg-type]
    size = x.shape[1] if directions is None else directions.shape[1]
    outputs = torch.empty(len(x), count, size, dtype=torch.float32, device=x.device)
    lengths = torch.empty(len(x), count, dtype=torch.float32, device=x.device)
    for index in range(count):
        output = expert_output(experts, index, x).float()
        lengths[:, index] = output.norm(dim=-1)
        outputs[:, index] = output if directions is None else output @ directions
    return outputs, lengths


def errors_by_count(routing: Routing, outputs: Tensor, order: Tensor) -> Tensor:
    """Remove expert after expert, and route all tokens anew each time.

    Args:
        routing: Routing of the tokens.
        outputs: Outputs of all experts for all tokens, `[T, E, r]`.
        order: Experts, the one that stays longest first, `[E]`.

    Returns:
        Mean squared error of a token's output by the number of experts that are left, `[E + 1]`.
    """
    alive = torch.ones(len(order), dtype=torch.bool, device=outputs.device)
    tokens = torch.arange(len(outputs), device=outputs.device)[:, None]
    whole: Tensor | None = None
    errors = torch.zeros(len(order) + 1, dtype=torch.float64)
    for count in range(len(order), 0, -1):
        indices, gates = routing.routed(alive)
        output = (gates[..., None] * outputs[tokens, indices]).sum(1)
        whole = output if whole is None else whole
        errors[count] = summed((output - whole).square()) / len(outputs)
        alive[order[count - 1]] = False
    errors[0] = 0.0 if whole is None else summed(whole.square()) / len(outputs)
    return errors
