"""Inputs and setup for tracing a model: one decode step with a KV cache, which also serves prefill."""

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

BATCH, PAST, LENGTH, KEPT_LOGITS = 2, 5, 4, 3
"""Sizes of the sample inputs. torch would make a batch of 1 constant, and could merge equal sizes into one axis."""
PADDED = 2
"""Number of masked positions in the sample's second row: the trace would drop a mask of ones only."""


def decode_step(model: PreTrainedModel, last: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build the sample inputs of a trace, and the list of their dynamic axes.

    The export is several times faster with explicit axes than with `Dim.AUTO` for all of them.

    Args:
        model: A causal language model, dense or pruned.
        last: Flag for a graph that returns logits of the last position alone, and takes no `logits_to_keep`.

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
        "logits_to_keep": 1 if last else torch.arange(LENGTH - KEPT_LOGITS, LENGTH),
        "use_cache": True,
    }
    dynamic = Dim.DYNAMIC
    shapes = {
        "input_ids": {0: dynamic, 1: dynamic},
        "attention_mask": {0: dynamic, 1: dynamic},
        "position_ids": {0: dynamic, 1: dynamic},
        "cache": [{0: dynamic, 2: dynamic}] * (2 * len(cache.layers)),
        "logits_to_keep": None if last else {0: dynamic},  # None: a constant
    }
    return inputs, shapes


def empty_cache(config: Any, batch: int, past: int = 0, dtype: torch.dtype = torch.float32) -> DynamicCache:
    """Make a KV cache of zeros. All layers keep every position; the attention mask applies sliding windows.

    Args:
        config: Configuration of a dense or pruned model.
        batch: Number of sequences.
        past: Number of positions in the cache.
        dtype: Dtype of keys and values.

    Returns:
        The cache; each layer has its own number of KV heads.
    """
    shape = shape_of(config)
    sizes = [(batch, layer.num_key_value_heads, past, shape.head_dim) for layer in shape.dense.layers]
    return cache_of([torch.zeros(size, dtype=dtype) for size in sizes for _ in ("keys", "values")])


def cache_of(states: Sequence[Tensor]) -> DynamicCache:
    """Make a KV cache from tensors, without copying them.

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
    """Position ids `[B, S]` of the last `length` columns of an attention mask `[B, P + S]`; padding is not counted."""
    return (mask.cumsum(1) - 1).clamp_min(0)[:, mask.shape[1] - length :]


def states_of(cache: Cache) -> list[Tensor]:
    """Keys and values `[B, G, P, D]` of a cache, layer by layer; the inverse of `cache_of`."""
    return [getattr(layer, what) for layer in cache.layers for what in ("keys", "values")]


@contextmanager
def tracing(model: PreTrainedModel) -> Iterator[None]:
    """Prepare torch and the exporters for a trace of `model`, and silence them.

    Args:
        model: Model to trace.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for cls in type(model).__mro__:
            module = sys.modules[cls.__module__]
            if hasattr(module, "slice_logits_to_keep"):
                # `hidden[:, indices]` would become two transposes around a GatherND; `_select` is one Gather.
                stack.enter_context(replaced(module, "slice_logits_to_keep", _select))
        stack.enter_context(_quadratic_rewrites_left_out())
        stack.enter_context(quiet())
        stack.enter_context(_no_collections())
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries: their stdout, warnings and log messages; keep them from configuring logging.

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


def _select(hidden: Tensor, positions: int | Tensor) -> Tensor:
    return hidden.index_select(1, positions) if isinstance(positions, Tensor) else hidden[:, -positions:]


@contextmanager
def _no_collections() -> Iterator[None]:
    """Disable garbage collection: it took an eighth of the time of a trace, which makes a million small objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quadratic_rewrites_left_out() -> Iterator[None]:
    """Disable onnxscript's rewrite rules that match pairs of nodes.

    Their matcher lists the whole graph at every node, which takes nine tenths of the optimiser's time for SmolLM2's 30
    layers. There is one such rule (two Slices → Split), and it matches nothing in these graphs.
    """
    try:
        from onnxscript import rewriter
    except ImportError:  # not installed: a format that needs no ONNX
        yield
        return
    rules = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit")
    with replaced(rewriter, "_DEFAULT_REWRITE_RULES", rules):
        yield
