"""The engines of the two models: the engine of the export that was published with the model, else PyTorch.

Both models run in the same engine and dtype, because a comparison across engines would be unfair. So where either
cannot run in the engine of the export, both run in PyTorch.
"""

from __future__ import annotations

import logging
import threading
from functools import cache

import torch
from model_source import UnavailableError, shown

from engines import llama_cpp, onnx_runtime, pytorch
from engines.base import Engine

load_lock = threading.Lock()
"""Lock that is held while a model is loaded: transformers sets torch's default dtype then, for every thread, and two
loads at once would leave it changed."""


def load(which: str) -> Engine:
    """Load the model `pruned` or `dense`."""
    with load_lock:  # two visitors share one download too
        return _load(which)


@cache
def _load(which: str) -> Engine:
    engines, _ = _exported()
    return engines[which] if engines else pytorch.load(which)


def why_pytorch() -> str:
    """Return why a published export is not used, in a sentence; empty where it is, or where there is none."""
    with load_lock:
        return _exported()[1]


@cache
def _exported() -> tuple[dict[str, Engine], str]:
    """Load both models in the engine of the export; return neither, and the reason, where that fails."""
    at = shown()
    if torch.cuda.is_available() or (at.gguf is None and at.graphs is None):
        return {}, ""
    try:
        return (onnx_runtime.load(at.graphs) if at.gguf is None else llama_cpp.load(at.gguf)), ""
    except UnavailableError as error:
        logging.getLogger(__name__).warning("the export is not used: %s", error.__cause__ or error)
        return {}, str(error)
