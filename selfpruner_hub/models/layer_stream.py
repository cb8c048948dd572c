"""Stream hidden states through the decoder layers, and gradients back, so that only one layer is worked on at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.models.patching import replaced
from selfpruner_hub.models.placement import placed
from selfpruner_hub.storage.offload import MEMORY, TensorStore

LAYER_BATCH_TOKENS = 2048
"""Number of tokens in one forward pass of a layer."""

Last = Callable[[int, Tensor], Tensor]
"""(index of the first window, last hidden states `[B, W, H]`) → gradient of the loss with respect to them."""
Call = Callable[[nn.Module, Tensor], Tensor]
"""Function that runs a decoder layer on hidden states, with the model's masks and positions for that layer."""


class Stream:
    """Hidden states of windows before one decoder layer of a model, in batches.

    Memory: one hidden state per token.

    Args:
        model: The model that provides embeddings and layers.
        windows: Token ids, `[N, W]`.
        store: Store for the hidden states.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, store: TensorStore = MEMORY) -> None:
        batches = windows.split(max(1, LAYER_BATCH_TOKENS // windows.shape[1]))
        self.hidden = [store(_embedded(model, batch)) for batch in batches]
        """Hidden states, one tensor `[B, W, H]` per batch."""
        self._device = model.device
        self._calls = {len(batch): _calls(model, batch) for batch in (batches[0], batches[-1])}

    def run(self, index: int, layer: nn.Module, number: int, watched: Sequence[Seen | Reached] = ()) -> Tensor | None:
        """Run a layer on one batch, without changing the stored hidden states.

        Args:
            index: Index of the layer in the model.
            layer: The layer, or its pruned copy.
            number: Index of the batch.
            watched: Hooks on modules inside the layer; one of them may end the pass.

        Returns:
            Output of the layer; None if a hook ended the pass.
        """
        hidden = self.on_device(number)
        with watching(watched):
            return self._calls[len(hidden)][index](layer, hidden)
        return None

    def on_device(self, number: int) -> Tensor:
        """Hidden states of one batch, `[B, W, H]`, on the device of the model; a copy if they rest elsewhere."""
        return self.hidden[number].to(self._device)

    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states of all batches by the output of a layer."""
        for number in range(len(self.hidden)):
            self.hidden[number].copy_(cast(Tensor, self.run(index, layer, number)))


def backward_by_layer(
    model: PreTrainedModel,
    windows: Tensor,
    last: Last,
    modules: Callable[[nn.Module], Sequence[nn.Module]],
    store: TensorStore,
) -> Iterator[tuple[int, nn.Module, Iterator[list[Tensor]]]]:
    """Run a model forward on all windows, then backward, last layer first; its weights must be frozen.

    The forward pass keeps the inputs of each layer; the backward pass runs one layer at a time again.

    Args:
        model: A causal language model.
        windows: Token ids, `[N, W]`.
        last: Function that starts the backward pass.
        modules: Function that returns the modules of a layer whose output gradients are wanted.
        store: Store for one hidden state per token and layer.

    Yields:
        Index of a layer, the layer, and an iterator that runs it on each batch: the gradients of the outputs of its
        modules, `[B, W, out]`. The iterator must end before the next layer.

    Raises:
        ModelError: The activations are not finite.
    """
    layers, stream = decoder_layers(model), Stream(model, windows, store)
    read = []
    for index, layer in enumerate(layers):
        read.append([store(hidden.clone()) for hidden in stream.hidden])
        with torch.no_grad(), placed(layer, model.device):
            stream.advance(index, layer)
    check_finite(stream.hidden)
    size = len(stream.hidden[0])
    gradients = [
        store(_behind(model, batch, stream.on_device(number), partial(last, number * size)))
        for number, batch in enumerate(windows.split(size))
    ]
    for index, layer in reversed(list(enumerate(layers))):
        stream.hidden = read.pop()
        yield index, layer, _through(stream, index, layer, modules(layer), gradients)


def _behind(model: PreTrainedModel, batch: Tensor, hidden: Tensor, last: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of the loss with respect to the last layer's output, `[B, W, H]`."""
    leaf = hidden.detach().requires_grad_()
    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(replaced(layer, "forward", lambda *_args, **_kwargs: leaf))
        out = model.get_decoder()(batch.to(model.device), use_cache=False).last_hidden_state
    out.backward(last(out.detach()))
    return cast(Tensor, leaf.grad)


def _through(
    stream: Stream, index: int, layer: nn.Module, modules: Sequence[nn.Module], gradients: list[Tensor]
) -> Iterator[list[Tensor]]:
    """Yield the gradients of the modules' outputs; replace `gradients` of the layer's output by those of its input."""
    for number, hidden in enumerate(stream.hidden):
        leaf = stream.hidden[number] = hidden.detach().requires_grad_()
        outputs = [Seen(module) for module in modules]
        after = cast(Tensor, stream.run(index, layer, number, outputs))
        tensors = [leaf, *(each.output for each in outputs)]
        back, *output_gradients = torch.autograd.grad(after, tensors, gradients[number].to(after.device))
        yield output_gradients
        gradients[number].copy_(back)  # at the end, because `found` may contain the same tensor


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Check that the activations of a model are finite.

    Args:
        tensors: Activations, or sums of them.

    Raises:
        ModelError: A value is not finite.
    """
    if not all(each.isfinite().all() for each in tensors):
        raise ModelError("The model's activations are not finite.", "Check its weights, or load it in float32.")


class Stop(Exception):  # noqa: N818  (not an error)
    """Ends a forward pass early, when the rest is not needed."""


class Seen:
    """A forward hook that keeps the latest input and output of a module.

    Of several outputs, such as those of a block with its router's scores, it keeps the first.
    """

    input: Tensor
    output: Tensor

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def install(self) -> RemovableHandle:
        """Install the hook."""
        return self._module.register_forward_hook(self)

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        """Keep input and output; called by PyTorch as the hook."""
        self.input, self.output = args[0], output if isinstance(output, Tensor) else output[0]


class Reached:
    """A hook that keeps what a module would read, and ends the pass before the module runs."""

    input: Tensor

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def install(self) -> RemovableHandle:
        """Install the hook."""
        return self._module.register_forward_pre_hook(self)

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the input; called by PyTorch as the hook."""
        self.input = args[0]
        raise Stop


@contextmanager
def watching(hooks: Sequence[Seen | Reached]) -> Iterator[None]:
    """Install hooks for the duration of the context; if a hook ends the pass, the context ends without an error."""
    handles = [each.install() for each in hooks]
    try:
        yield
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _calls(model: PreTrainedModel, batch: Tensor) -> list[Call]:
    """Functions that call each layer as the model does, for batches of this shape; no layer runs to find this out."""
    arguments: list[dict[str, Any]] = []

    def keep(*args: Tensor, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        arguments.append(kwargs)
        return cast(Tensor, hidden)

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(replaced(layer, "forward", keep))
        model.get_decoder()(batch.to(model.device), use_cache=False)

    def call(kwargs: dict[str, Any]) -> Call:
        return lambda layer, hidden: layer(hidden, **kwargs)

    return [call(kwargs) for kwargs in arguments]


def _embedded(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """The input of the first decoder layer."""
    inputs: list[Tensor] = []

    def keep(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        raise Stop

    handle = decoder_layers(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.get_decoder()(batch.to(model.device), use_cache=False)
    except Stop:
        pass
    finally:
        handle.remove()
    return inputs[0]
