"""The repair of a mixture: refit the output projections of its experts on the hidden states of the pruned model.

Which experts a token is routed to depends on how many are left, so no repair is made before the plan is chosen. Then
the output projections of all experts of a layer, and of its shared expert, are fitted together, first layer first, so
that the residual stream of the pruned model comes back to that of the whole one. Routers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.calibration.fisher import Fisher, roots_of
from selfpruner_hub.models.architectures import decoder_layers, experts_of, residual_scale
from selfpruner_hub.models.devices import ieee_products
from selfpruner_hub.models.layer_stream import Seen, Stream
from selfpruner_hub.models.mixtures.routing import activations, output_weight, routing_of, shared_output
from selfpruner_hub.models.mixtures.table import Experts
from selfpruner_hub.models.placement import on, placed
from selfpruner_hub.pruning.joint_fit import Summed, fit_together
from selfpruner_hub.pruning.least_squares import LinearFit
from selfpruner_hub.storage.run import DEFAULT_RUN, Run

DIRECT = 4_096
"""Maximum number of inputs of all projections of a layer for which one Cholesky factor is made."""


@torch.no_grad()
def compensate_experts(
    whole: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Tensor,
    ridges: Sequence[float],
    *,
    fisher: Fisher | None = None,
    run: Run = DEFAULT_RUN,
) -> None:
    """Refit the output projections of routed and shared experts of every layer, in place, first layer first.

    With z the inputs of all projections, each times its gate, W their weights side by side, and the target t the output
    that would bring the stream of the pruned model to that of the whole one: W* = (E[t zᵀ] + λ W) (E[z zᵀ] + λ I)⁻¹,
    with λ chosen on held-out windows. With more than `DIRECT` inputs, conjugate gradients that stop on these windows
    take its place (`joint_fit.fit_together`).

    Memory: two hidden states per token; for few inputs, twice their squared number; for many, the squared inputs of
    each expert, and six times the weights of the output projections, in float32.

    Args:
        whole: The mixture before it was cut.
        pruned: Its pruned copy.
        windows: Token ids of the calibration text, `[N, W]`.
        ridges: Candidates for λ, as for `sequential_repair.compensate`.
        fisher: Result of `fisher.output_fisher`; None weights all errors of an output equally.
        run: Run context; its checkpoints keep finished layers.

    Raises:
        ModelError: The statistics are degenerate.
    """
    row, config = experts_of(whole.config), whole.config
    scale, checkpoints = residual_scale(config), run.checkpoints
    original, moved = Stream(whole, windows, run.store), Stream(whole, windows, run.store)
    pairs = list(zip(decoder_layers(whole), decoder_layers(pruned), strict=True))
    roots = roots_of(fisher, len(pairs), whole.device)
    for index, ((full, layer), (_, root)) in enumerate(zip(pairs, roots, strict=True)):
        done = checkpoints.load(f"repair-{index}")
        if done:
            layer.load_state_dict(done)
        with placed(full, whole.device):
            original.advance(index, full)
        with placed(layer, whole.device, changed=True):
            if not done and row.placed(config, index):
                _Repair(row, layer, index, moved, original, scale).fit(ridges, root, run)
            if not done:
                checkpoints.save(f"repair-{index}", layer.state_dict())
            moved.advance(index, layer)
        run.progress("repairing", index + 1, len(pairs))


class _Repair:
    """The experts of one pruned layer, with the inputs and residuals of their block, batch by batch."""

    def __init__(
        self, row: Experts, layer: nn.Module, index: int, moved: Stream, original: Stream, scale: float
    ) -> None:
        self._row, self._layer = row, layer
        self._experts = cast(Any, layer.get_submodule(row.block).get_submodule("experts"))
        self._shared = shared_output(row, layer)
        self._stream = (index, moved, original, scale)
        self._weights = [output_weight(self._experts, each) for each in range(self._experts.num_experts)]
        if self._shared is not None:
            self._weights.append(self._shared.weight)

    @ieee_products()
    def fit(self, ridges: Sequence[float], root: Tensor | None, run: Run) -> None:
        """Fit all projections together, and write their weights."""
        batches = [tuple(run.store(each) for each in batch) for batch in self._seen()]
        sizes = [weight.shape[1] for weight in self._weights]

        def stream() -> Iterator[Summed]:
            for batch in on(self._weights[0].device, batches):
                yield self._summed(*batch)

        if sum(sizes) > DIRECT:
            for weight, change in zip(
                self._weights, fit_together(stream, sizes, len(self._weights[0]), root), strict=True
            ):
                weight.copy_(weight.float() + change)
            return
        joint = nn.Linear(sum(sizes), len(self._weights[0]), bias=False, device="meta")
        joint.weight = nn.Parameter(torch.cat([weight.float() for weight in self._weights], 1), requires_grad=False)
        fit = LinearFit(joint, ridges, root)
        for parts, rest in stream():
            z = self._side_by_side(parts, sizes, rest)
            fit.add(z, rest.float() + joint(z))
        fit.apply()
        for weight, fitted in zip(self._weights, joint.weight.split(sizes, 1), strict=True):
            weight.copy_(fitted)

    def _seen(self) -> Iterator[tuple[Tensor, ...]]:
        """Input of the block, what the shared expert's output projection reads, and the residual of the output."""
        index, moved, original, scale = self._stream
        for number in range(len(moved.hidden)):
            block = Seen(self._layer.get_submodule(self._row.block))
            shared = [] if self._shared is None else [Seen(self._shared)]
            after = cast(Tensor, moved.run(index, self._layer, number, [block, *shared]))
            rest = (original.on_device(number).float() - after.float()) / scale
            yield block.input, *(each.input for each in shared), rest.to(after.dtype)

    def _summed(self, h: Tensor, *others: Tensor) -> Summed:
        """The inputs of all projections, times the gates of their tokens."""
        (*shared, rest), x = others, h.flatten(0, -2)
        routing = routing_of(self._row, self._experts.config, self._layer, x)
        everyone = torch.ones(self._experts.num_experts, dtype=torch.bool, device=x.device)
        gates = routing.gates(everyone)
        parts = []
        for each in range(self._experts.num_experts):
            tokens = gates[:, each].nonzero()[:, 0]
            parts.append(
                (each, tokens, gates[tokens, each, None] * activations(self._experts, each, x[tokens]).float())
            )
        for inputs in shared:
            z = inputs.flatten(0, -2).float()
            if self._row.shared_gate:
                z = z * self._layer.get_submodule(self._row.shared_gate)(x).float().sigmoid()
            parts.append((len(parts), torch.arange(len(z), device=z.device), z))
        return Summed(parts, rest)

    def _side_by_side(self, parts: Sequence[tuple[int, Tensor, Tensor]], sizes: Sequence[int], rest: Tensor) -> Tensor:
        """All inputs in the columns of one matrix, 0 where a projection does not read a token, `[N, W, Σ in]`."""
        z = rest.new_zeros(rest.shape[:-1].numel(), sum(sizes), dtype=torch.float32)
        columns = z.split(list(sizes), 1)
        for block, tokens, x in parts:
            columns[block][tokens] = x
        return z.unflatten(0, rest.shape[:-1])
