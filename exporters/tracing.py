"""How a model is traced for export: one decode step with a KV cache, which serves prefill too."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.patching import replaced

BATCH, PAST, LENGTH, KEPT = 2, 5, 4, 3
"""Sizes of the sample. A batch of 1 would be frozen into the graph; equal sizes could be taken for one."""
PADDED = 2
"""Masked positions of the sample's second row: a mask of ones alone would be pruned from the graph."""


def decode_step(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs that a model is traced with, and which of their axes are dynamic.

    Explicit axes export several times faster than leaving all of them to torch (`Dim.AUTO`).

    Args:
        model: A causal language model, dense or pruned.

    Returns:
        `input_ids` and `position_ids` `[B, S]`, `attention_mask` `[B, P + S]`, `cache` (keys and values `[B, G, P, D]`
        with each layer's own G), `logits_to_keep` `[K]` (the positions whose logits are wanted) and `use_cache`; and
        the dynamic axes of each.
    """
    mask = torch.ones(BATCH, PAST + LENGTH, dtype=torch.long)
    mask[1, :PADDED] = 0
    cache = empty_cache(model.config, BATCH, PAST, model.dtype)
    inputs = {
        "input_ids": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "attention_mask": mask,
        "position_ids": positions(mask, LENGTH),
        "cache": cache,
        "logits_to_keep": torch.arange(LENGTH - KEPT, LENGTH),
        "use_cache": True,
    }
    dynamic = Dim.DYNAMIC
    shapes = {
        "input_ids": {0: dynamic, 1: dynamic},
        "attention_mask": {0: dynamic, 1: dynamic},
        "position_ids": {0: dynamic, 1: dynamic},
        "cache": [{0: dynamic, 2: dynamic}] * (2 * len(cache.layers)),
        "logits_to_keep": {0: dynamic},
    }
    return inputs, shapes


def empty_cache(config: Any, batch: int, past: int = 0, dtype: torch.dtype = torch.float32) -> DynamicCache:
    """A KV cache of zeros whose layers all keep every position: sliding windows are left to the attention mask.

    Args:
        config: Of a dense or a pruned model.
        batch: Sequences.
        past: Positions that it holds.
        dtype: Of keys and values.

    Returns:
        The cache; each layer has its own number of KV heads.
    """
    shape = shape_of(config)
    sizes = [(batch, layer.num_key_value_heads, past, shape.head_dim) for layer in shape.dense.layers]
    return cache_of([torch.zeros(size, dtype=dtype) for size in sizes for _ in ("keys", "values")])


def cache_of(states: Sequence[Tensor]) -> DynamicCache:
    """A KV cache of given tensors; they are not copied.

    Args:
        states: Keys and values `[B, G, P, D]`, layer by layer.

    Returns:
        The cache.
    """
    cache = DynamicCache()
    for keys, values in zip(states[::2], states[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def positions(mask: Tensor, length: int) -> Tensor:
    """Position ids `[B, S]` of the last `length` columns of an attention mask `[B, P + S]`; padding has no position."""
    return (mask.cumsum(1) - 1).clamp_min(0)[:, mask.shape[1] - length :]


def states_of(cache: Cache) -> list[Tensor]:
    """Keys and values `[B, G, P, D]` of a cache, layer by layer, as `cache_of` takes them."""
    return [getattr(layer, what) for layer in cache.layers for what in ("keys", "values")]


@contextmanager
def tracing(model: PreTrainedModel) -> Iterator[None]:
    """Prepare torch and the exporters for a trace of `model`, and keep them quiet.

    Args:
        model: The model that is about to be traced.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for cls in type(model).__mro__:
            module = sys.modules[cls.__module__]
            if hasattr(module, "slice_logits_to_keep"):
                # `hidden[:, indices]` would become two transposes around a GatherND; this is one Gather.
                stack.enter_context(replaced(module, "slice_logits_to_keep", _select))
        stack.enter_context(_quadratic_rewrites_left_out())
        stack.enter_context(quiet())
        stack.enter_context(_no_collections())
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from telling what they are doing: on stdout, as warnings, in the log, or by setting up logging.

    Yields:
        Nothing.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
            replaced(logging, "basicConfig", lambda **_kwargs: None),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _select(hidden: Tensor, kept: int | Tensor) -> Tensor:
    return hidden.index_select(1, kept) if isinstance(kept, Tensor) else hidden[:, -kept:]


@contextmanager
def _no_collections() -> Iterator[None]:
    """Put the collector of cycles off: a trace makes a million small objects, and an eighth of its time went there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quadratic_rewrites_left_out() -> Iterator[None]:
    """Leave out onnxscript's rewrite rules that try pairs of nodes.

    Their matcher lists the whole graph at every node: for SmolLM2's 30 layers that is nine tenths of the optimiser's
    time, and the one rule of that kind (two Slices → Split) finds nothing in these graphs.
    """
    try:
        from onnxscript import rewriter
    except ImportError:  # a format that needs no ONNX
        yield
        return
    kept = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit")
    with replaced(rewriter, "_DEFAULT_REWRITE_RULES", kept):
        yield
