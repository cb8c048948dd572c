"""The second repair: output projections refitted on the stream of the pruned model, layer by layer.

The first repair lets each layer approach its own dense output on dense inputs. Its errors add up: what reaches a layer
is no longer what it was calibrated on. Here each output projection in turn is fitted to what brings the pruned residual
stream back to the dense one, given all that was lost before it (error accumulation, as in SparseGPT and SliceGPT, with
the residual stream as target).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.calibration import exact_in_float32
from selfpruner_hub.corpus import Progress
from selfpruner_hub.errors import ModelError

BATCH_TOKENS = 4096
"""Tokens in one forward pass of a layer."""
RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-5, 5))
"""λ to choose from, in units of mean(diag E[x̂ x̂ᵀ]). Much more than a first repair needs: it keeps to what that gave,
and only what much text agrees on moves it."""
HELD_OUT = 4
"""One window in so many is held out to choose λ."""


@torch.no_grad()
def compensate(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Tensor,
    ridges: Sequence[float] = RIDGES,
    progress: Progress | None = None,
) -> None:
    """Refit o_proj and down_proj of every pruned layer, in place, first layer first.

    W* = (E[t x̂ᵀ] + λ W) (E[x̂ x̂ᵀ] + λ I)⁻¹ with x̂ the projection's input in the pruned model, W its weight before, and
    the target t = (dense stream after the block) - (pruned stream before it). Where the architecture normalises the
    output before it is added (Gemma 2 and 3), t is the dense output itself. λ is chosen for each projection: fitted to
    the other windows, it brings those that are held out nearest to their targets; then all windows are fitted.

    Memory: four hidden states per token, and twice the statistics of one projection.

    Args:
        dense: The dense model.
        pruned: Its pruned copy, with the layers' first repair.
        windows: Token ids of the calibration, `[N, W]`.
        ridges: λ to choose from, smallest first, in units of mean(diag E[x̂ x̂ᵀ]); it pulls toward the weight before.
            One alone is taken as it is; the greatest is where there are too few windows to hold one out.
        progress: Told how many layers are done.

    Raises:
        ModelError: The statistics are degenerate.
    """
    architecture = architecture_of(dense.config)
    batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
    streams = [_embedded(dense, batch) for batch in batches]  # of the dense model, and of the pruned one
    moved = [stream.clone() for stream in streams]
    calls = {len(batch): _calls(dense, batch) for batch in (batches[0], batches[-1])}
    pairs = list(zip(decoder_layers(dense), decoder_layers(pruned), strict=True))
    with exact_in_float32(dense.dtype):
        for index, (original, layer) in enumerate(pairs):
            blocks = [
                (linear(original, path), linear(layer, path))
                for path in (architecture.attention_output, architecture.ffn_output)
            ]
            wanted: list[list[Tensor]] = []
            for number, stream in enumerate(streams):
                call = calls[len(stream)][index]
                outputs = [_Seen(module) for module, _ in blocks]
                with _watching(outputs):
                    streams[number] = call(original, stream)
                wanted.append([each.output for each in outputs])
                if not architecture.output_norms:
                    wanted[-1][0] = _sum(outputs[0].output, stream, -moved[number])
            for block, (_, module) in enumerate(blocks):
                fit = _Fit(module, ridges)
                for hidden, targets in zip(moved, wanted, strict=True):
                    seen = [_Seen(m, last=m is module) for _, m in blocks[: block + 1]]
                    with _watching(seen):
                        calls[len(hidden)][index](layer, hidden)
                    target = targets[block]
                    if block and not architecture.output_norms:  # what the attention left of the drift
                        target = _sum(target, targets[0], -seen[0].output)
                    fit.add(seen[-1].input, target)
                module.weight.copy_(fit.solve(module.weight))
            moved = [calls[len(hidden)][index](layer, hidden) for hidden in moved]
            if progress:
                progress("repairing", index + 1, len(pairs))


def _sum(*parts: Tensor) -> Tensor:
    """Add large numbers that nearly cancel, and only then round."""
    return torch.stack([part.float() for part in parts]).sum(0).to(parts[0].dtype)


class _Fit:
    """A least-squares problem whose ridge is chosen on windows that are held out."""

    def __init__(self, module: nn.Linear, ridges: Sequence[float]) -> None:
        self._fitted, self._held = _Sums(module), _Sums(module)
        self._ridges = ridges
        self._windows = 0

    def add(self, x: Tensor, target: Tensor) -> None:
        """Take windows `[N, W, in]` and what should come of them, `[N, W, out]`."""
        number = torch.arange(self._windows, self._windows + len(x), device=x.device)
        self._windows += len(x)
        held = (number + 1) % HELD_OUT == 0
        self._fitted.add(x[~held], target[~held])
        self._held.add(x[held], target[held])

    def solve(self, before: Tensor) -> Tensor:
        """The weight that fits all windows, in the dtype of the weight before."""
        ridge = self._ridges[-1]
        if self._held.count:
            ridge = min(self._ridges, key=lambda each: self._held.error(self._fitted.solve(before, each)))
        self._fitted.include(self._held)
        return self._fitted.solve(before, ridge).to(before.dtype)


class _Sums:
    """E[x̂ x̂ᵀ] and E[t x̂ᵀ], as sums over tokens."""

    def __init__(self, module: nn.Linear) -> None:
        outputs, inputs = module.weight.shape
        self._bias = module.bias
        self.count = 0
        self._gram = torch.zeros(inputs, inputs, device=module.weight.device)
        self._cross = torch.zeros(outputs, inputs, device=module.weight.device)

    def add(self, x: Tensor, target: Tensor) -> None:
        x, target = x.flatten(0, -2).float(), target.flatten(0, -2).float()
        if self._bias is not None:
            target = target - self._bias.float()
        self.count += len(x)
        self._gram.addmm_(x.t(), x)
        self._cross.addmm_(target.t(), x)

    def include(self, other: _Sums) -> None:
        self.count += other.count
        self._gram += other._gram
        self._cross += other._cross

    def solve(self, before: Tensor, ridge: float) -> Tensor:
        """(E[t x̂ᵀ] + λ W) (E[x̂ x̂ᵀ] + λ I)⁻¹."""
        gram, cross = self._gram / self.count, self._cross / self.count
        damping = ridge * gram.diagonal().mean()
        gram.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed.item():
            raise ModelError("The calibration statistics of a layer are degenerate.", "Use more calibration tokens.")
        return torch.cholesky_solve((cross + damping * before.float()).t(), factor).t()

    def error(self, weight: Tensor) -> float:
        """E‖t - W x̂‖², but for E‖t‖²."""
        products = (weight @ self._gram) * weight - 2 * weight * self._cross
        return products.sum(dtype=torch.float64).item() / self.count


class _Stop(Exception):  # noqa: N818  (not an error)
    """Nothing that comes after is needed."""


class _Seen:
    """A forward hook that keeps the last input and output of a module; the last of several ends the pass."""

    input: Tensor
    output: Tensor

    def __init__(self, module: nn.Module, last: bool = False) -> None:
        self.module = module
        self._last = last

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.input, self.output = args[0], output
        if self._last:
            raise _Stop


@contextmanager
def _watching(seen: Sequence[_Seen]) -> Iterator[None]:
    handles = [each.module.register_forward_hook(each) for each in seen]
    try:
        yield
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


Call = Callable[[nn.Module, Tensor], Tensor]
"""Runs a decoder layer on hidden states, with the masks and positions that the model gives it."""


def _calls(model: PreTrainedModel, batch: Tensor) -> list[Call]:
    """How the model calls each of its layers, for batches of this shape; no layer is run for it."""
    kept: list[dict[str, Any]] = []

    def keep(*args: Tensor, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        kept.append(kwargs)
        return cast(Tensor, hidden)

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(patch.object(layer, "forward", keep))
        model.get_decoder()(batch.to(model.device), use_cache=False)

    def call(kwargs: dict[str, Any]) -> Call:
        return lambda layer, hidden: layer(hidden, **kwargs)

    return [call(kwargs) for kwargs in kept]


def _embedded(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """What the first decoder layer reads."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = decoder_layers(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.get_decoder()(batch.to(model.device), use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return kept[0]
