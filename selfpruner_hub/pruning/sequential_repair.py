"""The second repair: refit projections on the hidden states of the pruned model, layer by layer.

The first repair fits each layer to its own dense output on dense inputs. Its errors accumulate, so the inputs of a
layer differ from those that it was calibrated on. The second repair fits each output projection in turn so that the
residual stream of the pruned model comes back to that of the dense model, given the errors of all layers before (error
accumulation, as in SparseGPT and SliceGPT, with the residual stream as target). gate_proj and up_proj are refitted too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub import ranks
from selfpruner_hub.calibration.fisher import Fisher, roots_of
from selfpruner_hub.calibration.ridge import HELD_OUT, as_seen, split_held_out
from selfpruner_hub.models.architectures import Architecture, architecture_of, decoder_layers, linear, residual_scale
from selfpruner_hub.models.layer_stream import Reached, Seen, Stream, watching
from selfpruner_hub.models.patching import replaced
from selfpruner_hub.models.placement import on, placed, to_device
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
    """Refit o_proj, then gate_proj and up_proj, then down_proj of every pruned layer, in place, first layer first.

    Of a mixture, only the output projections of its experts (`expert_repair.compensate_experts`).

    W* = (E[t x̂ᵀ] + λ W) (E[x̂ x̂ᵀ] + λ I)⁻¹ for o_proj and down_proj, with x̂ the projection's input in the pruned model,
    W its weight before, and the target t = (dense stream after the block) - (pruned stream before it). If the
    architecture normalises the output before it is added (Gemma 2 and 3), t is the dense output itself. For each
    projection, λ minimises the error on held-out windows, which are the same in all layers and are not fitted. Before
    down_proj is fitted, gate_proj and up_proj move toward the same target (`least_squares.fit_inputs`); where that does
    not lower the error on the held-out windows, they keep their weights. The error of an output that differs from its
    target by δ is ‖R δ‖², with RᵀR the Fisher information of that output in the dense model.

    Memory: six hidden states, the input of o_proj and three inputs of down_proj per token (these where the store is in
    memory; else they are computed anew), and twice the statistics of one projection. Where the store is in the memory
    of the host, sums and factors rest there too while they are not in use.

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
    windows = windows[ranks.share(len(windows), HELD_OUT)]
    original, moved = Stream(dense, windows, store), Stream(dense, windows, store)
    pairs = list(zip(decoder_layers(dense), decoder_layers(pruned), strict=True))
    roots = roots_of(fisher, len(pairs), dense.device)
    ridge_indices: tuple[int | None, int | None] = (None, None)
    """Index of λ that the layer before took for o_proj and down_proj: that of this layer is near."""
    for index, ((whole, layer), (root, ffn_root)) in enumerate(zip(pairs, roots, strict=True)):
        if done := checkpoints.load(f"repair-{index}"):
            ridge_indices = (int(done.pop("ridge.attention")), int(done.pop("ridge.ffn")))
            layer.load_state_dict(done)
            for stream, each in ((original, whole), (moved, layer)):
                with placed(each, dense.device):
                    stream.advance(index, each)
            continue
        with placed(whole, dense.device):
            targets = _targets(architecture, index, whole, original, moved, store, scale)
        with placed(layer, dense.device, changed=True):
            attention = _Attention(architecture, index, layer, moved, store)
            first = attention.fit(targets, ridges, root, ridge_indices[0])
            ffn = _Ffn(architecture, layer, attention, targets, store, ffn_root)
            ridge_indices = (first, ffn.fit(ridges, ridge_indices[1], inputs=inputs))
            indices = dict(zip(("ridge.attention", "ridge.ffn"), map(torch.tensor, ridge_indices), strict=True))
            checkpoints.save(f"repair-{index}", {**layer.state_dict(), **indices})
            ffn.advance()
        del targets, attention, ffn  # the next layer takes their room
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

    def fit(self, targets: Targets, ridges: Sequence[float], root: Tensor | None, start: int | None) -> int:
        """Fit o_proj, and keep its inputs; see `LinearFit.apply` for λ."""
        fit = LinearFit(self.output, ridges, root, self._store.briefly)
        for number, (target, _) in enumerate(on(self.output.weight.device, targets)):
            reached = Reached(self.output)
            self._moved.run(self._index, self._layer, number, [reached])
            fit.add(reached.input, target)
            self._read.append(self._store(reached.input))
        return fit.apply(start)

    def run(self, number: int, watched: Sequence[Seen | Reached] = ()) -> Tensor | None:
        """Run the layer on one batch as `Stream.run` does, with the attention as it was read."""
        read = self._read[number].to(self.output.weight.device)
        with replaced(self._owner, "forward", lambda *_, **__: (self.output(read), None)):
            return self._moved.run(self._index, self._layer, number, watched)

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden states of all batches before the layer, `[B, W, H]`."""
        return self._moved.hidden


Activations = Callable[[int], tuple[Tensor, ...]]
"""Number of a batch → what down_proj reads in it, and where needed the factors of `least_squares.Gated`."""


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
        self._attention, self._store, self._root = attention, store, root
        owner, _, _ = architecture.ffn_output.rpartition(".")
        self._run = layer.get_submodule(owner)
        self._inputs = [linear(layer, p.path) for p in architecture.ffn_inputs]
        self._down = linear(layer, architecture.ffn_output)
        self._batches: list[tuple[Tensor, Tensor]] = []
        for number, (first, target) in enumerate(on(self._down.weight.device, targets)):
            added, reached = Seen(attention.output), Reached(self._inputs[0])
            attention.run(number, [added, reached])
            if not architecture.output_norms:  # the error that remains after the attention
                target = _sum(target, first, -added.output)
            self._batches.append((store(reached.input), store(target)))
        self._activations: Activations = lambda _number: ()

    def _each(self) -> Iterator[tuple[Tensor, ...]]:
        """The input and the target of each batch, on the device of the layer."""
        return on(self._down.weight.device, self._batches)

    def _input(self, number: int) -> Tensor:
        """The input of one batch, on the device of the layer."""
        return to_device(self._batches[number][0], self._down.weight.device)

    def _cached(self, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> Activations:
        """What is computed from the input of a batch; anew each time where it would be kept elsewhere."""
        if self._store.apart:
            return lambda number: compute(self._input(number))
        return [compute(h) for h, _ in self._each()].__getitem__

    def fit(self, ridges: Sequence[float], start: int | None, *, inputs: bool) -> int:
        """With `inputs`, move gate_proj and up_proj; then fit down_proj. See `LinearFit.apply` for λ."""
        self._activations = self._cached(self._linearised if inputs else self._activated)
        if inputs and self._fit_inputs():
            self._activations = self._cached(self._activated)
        fit = LinearFit(self._down, ridges, self._root, self._store.briefly)
        for number, (_, target) in enumerate(self._each()):
            fit.add(self._activations(number)[0], target)
        return fit.apply(start)

    def advance(self) -> None:
        """Replace the hidden states of all batches by the output of the layer."""
        for number, hidden in enumerate(self._attention.hidden):
            x = self._activations(number)[0]
            with replaced(self._run, "forward", lambda *_, x=x, **__: self._down(x)):
                hidden.copy_(cast(Tensor, self._attention.run(number)))

    def _fit_inputs(self) -> bool:
        """Refit gate_proj and up_proj if that lowers the error on the held-out windows; return whether it does."""
        rests = [
            (self._store(self._rest(self._down(self._activations(number)[0]), target)),)
            for number, (_, target) in enumerate(self._each())
        ]
        rows = [module.weight for module in self._inputs]

        def stream() -> Iterator[Gated]:
            for number, (rest,) in enumerate(on(rows[0].device, rests)):
                yield Gated(self._input(number), self._activations(number)[1], rest)

        down = as_seen(self._down.weight, self._root).to(self._down.weight.dtype)
        sizes = torch.Size((sum(map(len, rows)) // len(down.t()), *down.t().shape))
        change = fit_inputs(stream, sizes, down, self._store.briefly).flatten(0, 1)
        before = [weight.clone() for weight in rows]
        for weight, moved in zip(rows, change.split([len(weight) for weight in rows]), strict=True):
            weight.copy_(moved.add_(weight))
        helps = _squared(self._rest(self._run(h), target) for h, target in _held(self._each())) < _squared(
            rest for (rest,) in _held(rests)
        )
        if not helps:  # the step was too long for the nonlinear FFN, or was zero
            for weight, old in zip(rows, before, strict=True):
                weight.copy_(old)
        return helps

    def _activated(self, h: Tensor) -> tuple[Tensor]:
        """What down_proj reads, `[B, W, F]`."""
        reached = Reached(self._down)
        with watching([reached]):
            self._run(h)
        return (reached.input,)

    def _rest(self, output: Tensor, target: Tensor) -> Tensor:
        """The residual, target minus output, times R."""
        rest = _sum(target, -output)
        return rest if self._root is None else nn.functional.linear(rest, self._root.to(rest.dtype))

    def _linearised(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """What down_proj reads, and the factors of `least_squares.Gated`, from one pass.

        down_proj's input is an elementwise function of the outputs of gate_proj and up_proj, so its derivative with
        respect to them is the gradient of its sum.
        """
        given: list[Tensor] = []

        def leaf(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            given.append(output.detach().requires_grad_())
            return given[-1]

        handles = [module.register_forward_hook(leaf) for module in self._inputs]
        try:
            with torch.enable_grad():
                (x,) = self._activated(h)
                gradients = torch.autograd.grad(x.sum(), given)
        finally:
            for handle in handles:
                handle.remove()
        return x.detach(), torch.cat(gradients, -1).view(*h.shape[:-1], -1, x.shape[-1])


def _held(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The held-out windows, run by run."""
    windows = 0
    for batch in batches:
        for rows, held in split_held_out(windows, len(batch[0])):
            if held:
                yield tuple(each[rows] for each in batch)
        windows += len(batch[0])


def _squared(rests: Iterable[Tensor]) -> float:
    """Σ ‖rest‖² over the windows of all processes; NaN if any value is."""
    return ranks.added(sum(rest.float().square().sum().item() for rest in rests))


def _sum(*parts: Tensor) -> Tensor:
    """Sum in float32 and round once at the end, because the parts are large and nearly cancel."""
    return torch.stack([part.float() for part in parts]).sum(0).to(parts[0].dtype)
