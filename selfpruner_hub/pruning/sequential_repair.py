"""The second repair: refit projections on the hidden states of the pruned model, layer by layer.

The first repair fits each layer to its own dense output on dense inputs. Its errors accumulate, so the inputs of a
layer differ from those that it was calibrated on. The second repair fits each output projection in turn so that the
residual stream of the pruned model comes back to that of the dense model, given the errors of all layers before (error
accumulation, as in SparseGPT and SliceGPT, with the residual stream as target). gate_proj and up_proj are refitted too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.calibration.fisher import Fisher, roots_of
from selfpruner_hub.calibration.ridge import as_seen, split_held_out
from selfpruner_hub.models.architectures import Architecture, architecture_of, decoder_layers, linear, residual_scale
from selfpruner_hub.models.layer_stream import Seen, Stream, watching
from selfpruner_hub.models.patching import replaced
from selfpruner_hub.models.placement import on, placed
from selfpruner_hub.pruning.expert_repair import compensate_experts
from selfpruner_hub.pruning.least_squares import Gated, LinearFit, fit_inputs
from selfpruner_hub.storage.offload import TensorStore
from selfpruner_hub.storage.run import DEFAULT_RUN, Run

REPAIR_RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-5, 5))
"""Candidates for λ, in units of mean(diag E[x̂ x̂ᵀ]). They are much larger than in the first repair: they pull toward its
weights, and only what many tokens have in common changes these."""


@torch.no_grad()
def compensate(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Tensor,
    ridges: Sequence[float] = REPAIR_RIDGES,
    *,
    inputs: bool = True,
    fisher: Fisher | None = None,
    run: Run = DEFAULT_RUN,
) -> None:
    """Refit o_proj, gate_proj, up_proj and down_proj of every pruned layer, in place, first layer first.

    Of a mixture, only the output projections of its experts (`expert_repair.compensate_experts`).

    W* = (E[t x̂ᵀ] + λ W) (E[x̂ x̂ᵀ] + λ I)⁻¹ for o_proj and down_proj, with x̂ the projection's input in the pruned model,
    W its weight before, and the target t = (dense stream after the block) - (pruned stream before it). If the
    architecture normalises the output before it is added (Gemma 2 and 3), t is the dense output itself. For each
    projection, λ minimises the error on held-out windows, which are the same in all layers and are not fitted. Then
    gate_proj and up_proj move toward the same target (`least_squares.fit_inputs`), and down_proj is fitted again. If
    that does not lower the error on the held-out windows, they keep their weights. The error of an output that differs
    from its target by δ is ‖R δ‖², with RᵀR the Fisher information of that output in the dense model.

    Memory: six hidden states, the input of o_proj and two inputs of an FFN per token, and twice the statistics of one
    projection.

    Args:
        dense: The dense model.
        pruned: Its pruned copy, after the first repair.
        windows: Token ids of the calibration text, `[N, W]`.
        ridges: Candidates for λ, smallest first, in units of mean(diag E[x̂ x̂ᵀ]); the ridge pulls toward the weight
            before. A single one is used without a choice; the largest is used if there are too few windows to hold
            one out.
        inputs: Whether to refit gate_proj and up_proj too.
        fisher: Result of `fisher.output_fisher`; None weights all errors of an output equally.
        run: Run context; its checkpoints keep finished layers.

    Raises:
        ModelError: The statistics are degenerate.
    """
    architecture, scale = architecture_of(dense.config), residual_scale(dense.config)
    if architecture.experts is not None:
        compensate_experts(dense, pruned, windows, ridges, fisher=fisher, run=run)
        return
    store, checkpoints = run.store, run.checkpoints
    original, moved = Stream(dense, windows, store), Stream(dense, windows, store)
    pairs = list(zip(decoder_layers(dense), decoder_layers(pruned), strict=True))
    roots = roots_of(fisher, len(pairs), dense.device)
    for index, ((whole, layer), (root, ffn_root)) in enumerate(zip(pairs, roots, strict=True)):
        if done := checkpoints.load(f"repair-{index}"):
            layer.load_state_dict(done)
            original.advance(index, whole)
            moved.advance(index, layer)
            continue
        with placed(whole, dense.device):
            targets = _targets(architecture, index, whole, original, moved, store, scale)
        with placed(layer, dense.device, changed=True):
            attention = _Attention(architecture, index, layer, moved, store)
            attention.fit(targets, ridges, root)
            ffn = _Ffn(architecture, layer, attention, targets, store, ffn_root)
            ffn.fit_down(ridges)
            if inputs and ffn.fit_inputs():
                ffn.fit_down(ridges)
            checkpoints.save(f"repair-{index}", layer.state_dict())
            attention.advance()
        run.progress("repairing", index + 1, len(pairs))


Targets = list[list[Tensor]]
"""Per batch, the target outputs of the attention and of the FFN, `[B, W, H]` each."""


def _targets(
    architecture: Architecture,
    index: int,
    whole: nn.Module,
    original: Stream,
    moved: Stream,
    store: TensorStore,
    scale: float,
) -> Targets:
    """Advance the dense stream by one layer and return the targets.

    A target is the dense output; if outputs are not normalised, that of the attention also corrects the drift, the
    difference between the dense and the pruned stream before the layer. `scale` multiplies outputs as they are added to
    the stream.
    """
    targets = []
    for number, hidden in enumerate(original.hidden):
        outputs = [Seen(linear(whole, path)) for path in (architecture.attention_output, architecture.ffn_output)]
        after = original.run(index, whole, number, outputs)
        first, second = (each.output for each in outputs)
        if not architecture.output_norms:
            before, drifted = original.on_device(number), moved.on_device(number)
            first = _sum(first, before.float() / scale, -drifted.float() / scale)
        targets.append([store(first), store(second)])
        hidden.copy_(cast(Tensor, after))
    return targets


class _Attention:
    """The attention of a pruned layer, which runs once: what o_proj reads does not change when o_proj is fitted."""

    def __init__(
        self, architecture: Architecture, index: int, layer: nn.Module, moved: Stream, store: TensorStore
    ) -> None:
        self.output = linear(layer, architecture.attention_output)
        self._owner = layer.get_submodule(architecture.attention_output.rpartition(".")[0])
        self._index, self._layer, self._moved, self._store = index, layer, moved, store
        self._read: list[Tensor] = []

    def fit(self, targets: Targets, ridges: Sequence[float], root: Tensor | None) -> None:
        """Fit o_proj, and keep its inputs."""
        fit = LinearFit(self.output, ridges, root)
        for number, (target, _) in enumerate(on(self.output.weight.device, targets)):
            seen = Seen(self.output, last=True)
            self._moved.run(self._index, self._layer, number, [seen])
            fit.add(seen.input, target)
            self._read.append(self._store(seen.input))
        fit.apply()

    def run(self, number: int, watched: Sequence[Seen] = ()) -> Tensor | None:
        """Run the layer on one batch as `Stream.run` does, with the attention as it was read."""
        read = self._read[number].to(self.output.weight.device)
        with replaced(self._owner, "forward", lambda *_, **__: (self.output(read), None)):
            return self._moved.run(self._index, self._layer, number, watched)

    def advance(self) -> None:
        """Replace the hidden states of all batches by the output of the layer."""
        for number, hidden in enumerate(self._moved.hidden):
            hidden.copy_(cast(Tensor, self.run(number)))


class _Ffn:
    """The FFN of a pruned layer whose attention is repaired, with its inputs and target outputs, batch by batch."""

    def __init__(
        self,
        architecture: Architecture,
        layer: nn.Module,
        attention: _Attention,
        targets: Targets,
        store: TensorStore,
        root: Tensor | None,
    ) -> None:
        self._store, self._root = store, root
        owner, _, _ = architecture.ffn_output.rpartition(".")
        self._run = layer.get_submodule(owner)
        self._inputs = [linear(layer, p.path) for p in architecture.ffn_inputs]
        self._down = linear(layer, architecture.ffn_output)
        self._batches: list[tuple[Tensor, Tensor]] = []
        for number, (first, target) in enumerate(on(self._down.weight.device, targets)):
            outputs = Seen(attention.output), Seen(self._inputs[0], last=True)
            attention.run(number, outputs)
            if not architecture.output_norms:  # the error that remains after the attention
                target = _sum(target, first, -outputs[0].output)
            self._batches.append((store(outputs[1].input), store(target)))

    def _each(self) -> Iterator[tuple[Tensor, ...]]:
        """The input and the target of each batch, on the device of the layer."""
        return on(self._down.weight.device, self._batches)

    def fit_down(self, ridges: Sequence[float]) -> None:
        fit = LinearFit(self._down, ridges, self._root)
        for h, target in self._each():
            seen = Seen(self._down, last=True)
            with watching([seen]):
                self._run(h)
            fit.add(seen.input, target)
        fit.apply()

    def fit_inputs(self) -> bool:
        """Refit gate_proj and up_proj if that lowers the error on the held-out windows; return whether it does."""
        expanded = [tuple(map(self._store, self._linearised(*batch))) for batch in self._each()]

        def stream() -> Iterator[Gated]:
            for (h, _), (factors, rest) in zip(self._each(), on(rows[0].device, expanded), strict=True):
                yield Gated(h, factors, rest)

        rows = [module.weight for module in self._inputs]
        before = [weight.clone() for weight in rows]
        stacked = torch.cat(rows).view(-1, *self._down.weight.t().shape)
        down = as_seen(self._down.weight, self._root)
        moved = (stacked.float() + fit_inputs(stream, stacked, down)).flatten(0, 1)
        for weight, new in zip(rows, moved.split([len(weight) for weight in rows]), strict=True):
            weight.copy_(new)
        helps = _squared(self._rest(self._run(h), target) for h, target in _held(self._each())) < _squared(
            rest for (rest,) in _held((rest,) for _, rest in expanded)
        )
        if not helps:  # the step was too long for the nonlinear FFN, or was zero
            for weight, old in zip(rows, before, strict=True):
                weight.copy_(old)
        return helps

    def _rest(self, output: Tensor, target: Tensor) -> Tensor:
        """The residual, target minus output, times R."""
        rest = _sum(target, -output)
        return rest if self._root is None else nn.functional.linear(rest, self._root.to(rest.dtype))

    def _linearised(self, h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The factors and the residual of `least_squares.Gated`, from one pass.

        down_proj's input is an elementwise function of the outputs of gate_proj and up_proj, so its derivative with
        respect to them is the gradient of its sum.
        """
        given: list[Tensor] = []

        def leaf(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            given.append(output.detach().requires_grad_())
            return given[-1]

        seen = Seen(self._down, last=True)
        handles = [module.register_forward_hook(leaf) for module in self._inputs]
        try:
            with torch.enable_grad():
                with watching([seen]):
                    self._run(h)
                gradients = torch.autograd.grad(seen.input.sum(), given)
        finally:
            for handle in handles:
                handle.remove()
        factors = torch.cat(gradients, -1).view(*h.shape[:-1], -1, seen.input.shape[-1])
        return factors, self._rest(self._down(seen.input.detach()), target)


def _held(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The held-out windows, run by run."""
    windows = 0
    for batch in batches:
        for rows, held in split_held_out(windows, len(batch[0])):
            if held:
                yield tuple(each[rows] for each in batch)
        windows += len(batch[0])


def _squared(rests: Iterable[Tensor]) -> float:
    """Σ ‖rest‖²; NaN if any value is."""
    return sum(rest.float().square().sum().item() for rest in rests)


def _sum(*parts: Tensor) -> Tensor:
    """Sum in float32 and round once at the end, because the parts are large and nearly cancel."""
    return torch.stack([part.float() for part in parts]).sum(0).to(parts[0].dtype)
