"""llama.cpp's C functions for quantising tensors and for the likelihood of text; its Python packages lack both.

They are called in the library that a Python package brings: xllamacpp's extension, or libllama of llama-cpp-py-sync.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from exporters import machine
from selfpruner_hub.errors import ModelError, UserError

PACKAGES = ("xllamacpp", "llama_cpp_py_sync")
CONTEXT_DEFAULTS = (512, 2048, 512, 1)
"""First members of llama.cpp's default `llama_context_params`: n_ctx, n_batch, n_ubatch, n_seq_max."""
ROWS = 64
"""Rows of a tensor that one thread quantises at a time."""


class _Parameters(ctypes.Structure):
    """Parameters of a model or a context, larger than any release's: llama.cpp fills in its own fields."""

    _fields_ = (("values", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _LOG(lambda level, text, data: None)
_int, _long, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_quantize_chunk": (ctypes.c_size_t, (_int, _pointer, _pointer, _long, _long, _long, _pointer)),
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, _pointer)),
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (_pointer, (ctypes.c_char_p, _Parameters)),
    "llama_init_from_model": (_pointer, (_pointer, _Parameters)),
    "llama_set_n_threads": (None, (_pointer, _int, _int)),
    "llama_model_get_vocab": (_pointer, (_pointer,)),
    "llama_vocab_n_tokens": (_int, (_pointer,)),
    "llama_get_memory": (_pointer, (_pointer,)),
    "llama_memory_clear": (None, (_pointer, ctypes.c_bool)),
    "llama_batch_init": (_Batch, (_int, _int, _int)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (_int, (_pointer, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_pointer,)),
    "llama_free": (None, (_pointer,)),
    "llama_model_free": (None, (_pointer,)),
}
"""Result and arguments of each function that is called."""


def library() -> ctypes.CDLL:
    """Load llama.cpp's library.

    Returns:
        The library, with the functions of `_FUNCTIONS` declared.

    Raises:
        UserError: No package has one, or it has other functions than these.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None and (path := _declared(name)) is not None:
            return path
    raise UserError(
        "llama.cpp's library is not installed, or it does not have the functions that K-quants need.",
        'Install it with: pip install "selfpruner-hub[gguf]" (or llama-cpp-py-sync); or choose f16 or q8_0.',
    )


@cache
def _declared(package: str) -> ctypes.CDLL | None:
    folder = Path(str(importlib.import_module(package).__file__)).parent
    names = [
        f"{stem}*{end}" for stem in ("xllamacpp", "libllama", "llama") for end in (".so", ".dylib", ".dll", ".pyd")
    ]
    for path in (path for name in names for path in sorted(folder.glob(name))):
        loaded = ctypes.CDLL(str(path))
        try:
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(loaded, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError:
            continue
        if tuple(loaded.llama_context_default_params().values[: len(CONTEXT_DEFAULTS)]) == CONTEXT_DEFAULTS:
            loaded.llama_backend_init()
            return loaded
    return None


def quantise(values: np.ndarray, kind: GGMLQuantizationType, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantise a tensor, as `llama-quantize` does.

    Args:
        values: Values, float32, `[rows, columns]`, contiguous.
        kind: Type of the blocks; its block size divides the columns.
        importance: Mean square of the input that each column multiplies, float32, `[columns]`: errors in important
            columns count more. None counts all alike.

    Returns:
        Blocks, uint8, `[rows, bytes of a row]`.
    """
    (rows, columns), (block, size) = values.shape, GGML_QUANT_SIZES[kind]
    out = np.empty((rows, columns // block * size), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    run = partial(library().ggml_quantize_chunk, kind.value, values.ctypes.data, out.ctypes.data)
    with ThreadPoolExecutor(machine.usable_threads()) as threads:
        for _ in threads.map(
            lambda first: run(first * columns, min(ROWS, rows - first), columns, weights), range(0, rows, ROWS)
        ):
            pass
    return out


def gguf_cross_entropy(path: Path, windows: Tensor, threads: int | None = None) -> float:
    """Mean negative log-likelihood of text in llama.cpp, for each predicted token.

    Args:
        path: Path of the GGUF file.
        windows: Token ids, `[N, W]`; each window is predicted on its own, from its second token on.
        threads: Number of CPU threads; None takes PyTorch's number, at most the cores that this process may use.

    Returns:
        Nats per token.

    Raises:
        UserError: llama.cpp's library is not installed.
        ModelError: llama.cpp cannot load or run the file.
    """
    total = 0.0
    with _context(path, windows.shape[1], threads or machine.usable_threads()) as (run, vocabulary):
        for window in windows:
            logits = torch.from_numpy(np.ctypeslib.as_array(run(window.tolist()), (len(window), vocabulary)))
            total += torch.nn.functional.cross_entropy(logits[:-1], window[1:].long(), reduction="sum").item()
    return total / (len(windows) * (windows.shape[1] - 1))


@contextmanager
def _context(path: Path, length: int, threads: int) -> Iterator[tuple[Any, int]]:
    """Load a file; yield a function from one sequence of tokens to all its logits, and the size of the vocabulary."""
    call = library()
    call.llama_log_set(_silent, None)
    model = call.llama_model_load_from_file(str(path).encode(), call.llama_model_default_params())
    if not model:
        raise ModelError(f"llama.cpp cannot load {str(path)!r}.", "Export the model again.")
    parameters = call.llama_context_default_params()
    parameters.values[:3] = [length] * 3
    context = call.llama_init_from_model(model, parameters)
    call.llama_set_n_threads(context, threads, threads)
    batch = call.llama_batch_init(length, 0, 1)

    def run(ids: list[int]) -> Any:
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        call.llama_memory_clear(call.llama_get_memory(context), True)
        if call.llama_decode(context, batch):
            raise ModelError(f"llama.cpp cannot run {str(path)!r} on {len(ids)} tokens.", "Try shorter windows.")
        return call.llama_get_logits(context)

    try:
        yield run, call.llama_vocab_n_tokens(call.llama_model_get_vocab(model))
    finally:
        call.llama_batch_free(batch)
        call.llama_free(context)
        call.llama_model_free(model)
