"""SliceGPT (arXiv 2401.15024): the residual stream in fewer principal components, as its authors' code does it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.models.architectures import decoder_layers, shape_of
from selfpruner_hub.models.layer_stream import Stream


def components(model: PreTrainedModel, beta: float) -> int:
    """Number of components with which the share β of the prunable weights is gone; the shortcuts' matrices count."""
    shape = shape_of(model.config)
    weights = shape.weights(shape.dense) / shape.num_layers
    per_component = weights / shape.hidden_size
    root = math.sqrt(per_component**2 + 8 * (1 - beta) * weights)  # of 2 k² + per_component k = (1 - β) weights
    return int((root - per_component) / 4)


@torch.no_grad()
def sliced(model: PreTrainedModel, windows: Tensor, components: int) -> nn.ModuleList:
    """Slice every decoder layer of a Llama.

    Each block (attention or FFN) reads and writes the stream in the principal components of its own input. They are
    found in turn, on the stream that the sliced blocks before produce. The last block writes the whole stream.

    Args:
        model: The dense model, which does not change.
        windows: Token ids of the calibration text, `[N, W]`.
        components: Number of components, at most the hidden size.

    Returns:
        The sliced layers, for `with_layers`. The first projects the embeddings, which the authors' code does in the
        table of embeddings.
    """
    stream = Stream(model, windows)
    layers = decoder_layers(model)
    enter = _components(stream.hidden, components)
    modules = nn.ModuleList()
    for index, layer in enumerate(layers):
        attention = Block(layer.self_attn, ("q_proj", "k_proj", "v_proj"), "o_proj", layer.input_layernorm, enter)
        first = enter if index == 0 else None
        between = _components(_outputs(stream, index, Sliced(first, attention)), components)
        attention.leave(between)
        ffn = Block(layer.mlp, ("gate_proj", "up_proj"), "down_proj", layer.post_attention_layernorm, between)
        whole = Sliced(first, attention, ffn)
        outputs = list(_outputs(stream, index, whole))
        if index + 1 < len(layers):
            enter = _components(outputs, components)
            ffn.leave(enter)
            outputs = [each @ enter.to(each.dtype) for each in outputs]
        stream.hidden = outputs
        modules.append(whole)
    return modules


class Sliced(nn.Module):
    """A sliced decoder layer.

    Args:
        enter: Components of the embeddings, `[H, K]`, for the first layer.
        attention: Its attention.
        ffn: Its FFN; None where it is not sliced yet.
    """

    def __init__(self, enter: Tensor | None, attention: Block, ffn: Block | None = None) -> None:
        super().__init__()
        self.register_buffer("enter", enter)
        self.attention, self.ffn = attention, ffn

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Run attention and FFN on the stream, `[B, W, K]`, or on embeddings, `[B, W, H]`."""
        if self.enter is not None:
            hidden = hidden @ self.enter.to(hidden.dtype)
        hidden = self.attention(hidden, **kwargs)
        return hidden if self.ffn is None else self.ffn(hidden)


class Block(nn.Module):
    """Attention or FFN between two bases of the stream.

    Args:
        module: The dense attention or FFN, which is copied.
        readers: Names of its projections that read the stream.
        writer: Name of the projection that writes to it.
        norm: The RMS norm before it; its gain goes into the readers.
        enter: Components that it reads, `[H, K]`.
    """

    def __init__(self, module: nn.Module, readers: Sequence[str], writer: str, norm: Any, enter: Tensor) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        self._size, self._epsilon, self._writer = len(enter), norm.variance_epsilon, writer
        for name in readers:
            reader = self.module.get_submodule(name)
            reader.weight = _like(reader.weight, (reader.weight.double() * norm.weight.double()) @ enter)
        self.shortcut = _like(norm.weight, enter.t())

    def leave(self, basis: Tensor) -> None:
        """Write the stream in the components `basis`, `[H, K]`, in place of the whole."""
        writer = self.module.get_submodule(self._writer)
        writer.weight = _like(writer.weight, basis.t() @ writer.weight.double())
        if writer.bias is not None:
            writer.bias = _like(writer.bias, writer.bias.double() @ basis)
        self.shortcut = _like(self.shortcut, self.shortcut.double() @ basis)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Add the module's output to the stream, in the basis of what comes next."""
        mean = hidden.float().square().sum(-1, keepdim=True) / self._size  # of the whole stream, without what was cut
        normed = (hidden.float() * torch.rsqrt(mean + self._epsilon)).to(hidden.dtype)
        output = self.module(normed, **kwargs)
        return hidden @ self.shortcut + (output[0] if isinstance(output, tuple) else output)


def _outputs(stream: Stream, index: int, layer: nn.Module) -> Iterable[Tensor]:
    for number in range(len(stream.hidden)):
        output = stream.run(index, layer, number)
        assert output is not None
        yield output


def _components(signals: Iterable[Tensor], components: int) -> Tensor:
    """The first eigenvectors of Σ x xᵀ, `[H, components]`, float64."""
    total: Any = 0
    for signal in signals:
        x = signal.flatten(0, -2).double()
        total = total + x.t() @ x
    return torch.linalg.eigh(total).eigenvectors.flip(1)[:, :components]


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.to(old.dtype).contiguous(), requires_grad=False)
