"""Cut layers: build candidates as views of ordered dense weights (`ordering.ordered`), build compact models to save."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from selfpruner_hub.models.architectures import (
    Block,
    architecture_of,
    block_rows,
    decoder_layers,
    expert_tensors,
    linear,
    model_class,
    output_columns,
    own_widths,
    shape_of,
    stock_class,
    unit_rows,
)
from selfpruner_hub.models.modeling_selfpruned import LayerConfig
from selfpruner_hub.models.weights import is_tied, rebuild_buffers
from selfpruner_hub.plans.plan import LayerWidths, ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import LossCurves
from selfpruner_hub.pruning.output_repair import LayerRepairs
from selfpruner_hub.storage.offload import MEMORY, TensorStore

Part = Literal["attention", "ffn"]
PARTS: tuple[Part, Part] = ("attention", "ffn")
"""The two parts of a decoder layer; each has its own output projection."""
CACHED_REPAIRS = 1.0
"""Memory for cached repaired weights, as a multiple of the dense model's output projection weights."""


class Slicer:
    """Cuts the layers of one dense model, whose weights are in order of importance (see `ordered`).

    Args:
        model: The dense model, permuted.
        repairs: Result of `output_repair.first_repairs`; None does not repair.
        store: Store for the weights of a cut model, and for the repaired weights of candidates, which are cached only
            if it leaves them where they are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        repairs: Sequence[LayerRepairs] | None = None,
        store: TensorStore = MEMORY,
    ) -> None:
        self.model = model
        self.store = store
        self.shape = shape_of(model.config)
        self._architecture = architecture_of(model.config)
        self._dense = decoder_layers(model)
        self._paths = (self._architecture.attention_output, self._architecture.ffn_output)
        self.repairs = repairs
        self._cache: OrderedDict[tuple[int, Part, int], Tensor] = OrderedDict()
        self._free = 0
        if self.repairs is not None and not store.apart:
            outputs = sum(linear(layer, path).weight.numel() for layer in self._dense for path in self._paths)
            self._free = int(CACHED_REPAIRS * outputs)

    def errors(self) -> list[tuple[Tensor, Tensor]]:
        """Expected squared output error of each layer after the first repair, by width, in the terms of the repairs.

        Returns:
            Per layer, the errors with 0 to G KV groups kept, `[G + 1]`, and with 0 to F channels kept, `[F + 1]`.

        Raises:
            ValueError: The slicer has no repairs.
        """
        if self.repairs is None:
            raise ValueError("a slicer without repairs knows no errors")
        return [(attention.errors()[:: self.unit("query")], ffn.errors()) for attention, ffn in self.repairs]

    def loss_curves(self) -> list[LossCurves]:
        """Predict the loss of each layer alone: half the expected error of its outputs after the first repair.

        Returns:
            One pair of curves per layer, in nats per token if the slicer has the Fisher information.

        Raises:
            ValueError: The slicer has no repairs.
        """
        return [LossCurves((attention / 2).numpy(), (ffn / 2).numpy()) for attention, ffn in self.errors()]

    def unit(self, block: Block) -> int:
        """Number of rows of one KV group (or one channel) in a block of this kind."""
        return unit_rows(self.shape, block)

    def layer(self, index: int, widths: LayerWidths) -> nn.Module:
        """Build layer `index` with these widths: views of the dense weights, and repaired output projections."""
        return _cut(self._dense[index], self.model, index, widths, self.shape, self._outputs(index, widths))

    def layers(self, plan: Plan) -> nn.ModuleList:
        """Build the decoder layers of a candidate."""
        return nn.ModuleList(self.layer(index, widths) for index, widths in enumerate(plan.layers))

    def output_weight(self, index: int, part: Part, count: int) -> Tensor:
        """Repaired weight of a part's output projection if the part keeps its first `count` units; not cached.

        Args:
            index: Index of the layer.
            part: The attention or the FFN.
            count: Number of KV groups or channels to keep; at least 1.

        Returns:
            Weight, `[H, columns]`; a view of the dense weight if nothing is repaired.
        """
        which = PARTS.index(part)
        columns = count * self.unit("query" if part == "attention" else "channel")
        weight = linear(self._dense[index], self._paths[which]).weight.detach()
        if self.repairs is None or columns == weight.shape[1]:
            return weight[:, :columns]
        return self.repairs[index][which].weight(columns)

    def _outputs(self, index: int, widths: LayerWidths) -> dict[str, Tensor]:
        """Repaired weights of the output projections whose width changes, cached by (layer, part, width)."""
        if self.repairs is None:
            return {}
        dense = self.shape.dense.layers[index]
        return {
            path: self._memoised(index, part, units(widths, part))
            for path, part in zip(self._paths, PARTS, strict=True)
            if units(widths, part) < units(dense, part)
        }

    def _memoised(self, index: int, part: Part, count: int) -> Tensor:
        key = (index, part, count)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        weight = self.output_weight(index, part, count)
        if self.store.apart:  # all layers of a candidate are built before the first one runs
            return self.store(weight)
        self._cache[key] = weight
        self._free -= weight.numel()
        while self._free < 0 and len(self._cache) > 1:
            self._free += self._cache.popitem(last=False)[1].numel()
        return weight


@torch.no_grad()  # not inference_mode, because the returned model can be fine-tuned
def slice_model(slicer: Slicer, plan: Plan, *, stock: bool = False) -> PreTrainedModel:
    """Build the compact pruned model of `plan` from copies of the sliced weights; the dense model shares none of them.

    Args:
        slicer: Slicer of the dense model.
        plan: Widths to keep.
        stock: Whether the model is of the dense model's class; all layers must have the same widths.

    Returns:
        A model of the matching `selfpruned_*` class, or of the stock class, in eval mode, where the slicer stores.
    """
    dense = slicer.model
    config = pruned_config(dense, plan, stock=stock)
    with torch.device("meta"):
        model = (stock_class if stock else model_class)(dense.config)(config)
    state = {k: v for k, v in dense.state_dict().items() if ".layers." not in k}
    prefix = next(name for name, module in model.named_modules() if module is decoder_layers(model))
    for index, widths in enumerate(plan.layers):
        state.update({f"{prefix}.{index}.{k}": v for k, v in slicer.layer(index, widths).state_dict().items()})
    model.load_state_dict({k: _own(v, slicer.store) for k, v in state.items()}, assign=True, strict=True)
    model.tie_weights()
    rebuild_buffers(model)
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model.eval()


def _own(tensor: Tensor, store: TensorStore) -> Tensor:
    """A contiguous copy, in memory or in `store`."""
    if not store.apart:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    return store(tensor.detach().contiguous())


def pruned_config(dense: PreTrainedModel, plan: Plan, *, stock: bool = False) -> PreTrainedConfig:
    """The configuration of the pruned model: dense values at the top level, `plan` in `per_layer_config`.

    That of a stock class has the widths of all layers at the top level. Whether embeddings and head are tied is read
    from the weights of the dense model.
    """
    values = dense.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version"):
        values.pop(key, None)
    if values.get("output_router_logits") and not stock:
        values["output_router_logits"] = False  # the loss that balances experts takes one number of them for all layers
    per_layer = dict(enumerate(own_widths(dense.config, plan)))
    build = stock_class if stock else model_class
    config_class: type[PreTrainedConfig] = build(dense.config).config_class  # type: ignore[assignment]
    extra: dict[str, object] = {**per_layer[0]} if stock else {"per_layer_config": per_layer}
    extra |= {"head_dim": shape_of(dense.config).head_dim, "tie_word_embeddings": is_tied(dense)}
    config = config_class(**{**values, **extra})
    config._attn_implementation_internal = dense.config._attn_implementation_internal
    config._experts_implementation_internal = dense.config._experts_implementation_internal
    return config


def _cut(
    dense: nn.Module,
    model: PreTrainedModel,
    index: int,
    widths: LayerWidths,
    shape: ModelShape,
    outputs: dict[str, Tensor],
) -> nn.Module:
    """A stock decoder layer with these widths; its weights are views of the first rows and columns of `dense`."""
    architecture = architecture_of(model.config)
    (attributes,) = own_widths(model.config, Plan((widths,)))
    config = LayerConfig(model.config, head_dim=shape.head_dim, **attributes)
    with torch.device("meta"):
        layer = type(dense)(config, index)
    tensors = {name: parameter.detach() for name, parameter in dense.named_parameters()}
    for name, (tensor, dimension) in expert_tensors(architecture, dense).items():
        tensors[name] = tensor.narrow(dimension, 0, widths.intermediate_size)
    full = shape.dense.layers[index]
    for projection in architecture.rows:
        spans, offset = [], 0
        for block in projection.blocks:
            spans.append((offset, block_rows(shape, widths, block)))
            offset += block_rows(shape, full, block)
        for name in (f"{projection.path}.weight", f"{projection.path}.bias"):
            if name in tensors:
                by_row, rest = tensors[name].view(offset, -1), tensors[name].shape[1:]
                views = [by_row.narrow(0, *span) for span in spans]
                tensors[name] = (views[0] if len(views) == 1 else torch.cat(views)).view(-1, *rest)
    for path, columns in output_columns(architecture, shape, widths).items():
        name = f"{path}.weight"
        tensors[name] = outputs.get(path, tensors[name].narrow(1, 0, columns))
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = layer.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return layer.eval()


def units(widths: LayerWidths, part: Part) -> int:
    """Number of KV groups, or of FFN units, in `widths`."""
    return widths.num_key_value_heads if part == "attention" else widths.intermediate_size
