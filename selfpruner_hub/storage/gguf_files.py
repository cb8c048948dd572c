"""GGUF files: read once while a model is loaded from one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Let transformers read a GGUF file once.

    It reads the file, vocabulary and all, for each of configuration, weights and tokenizer, and makes the names of its
    tensors anew for every module: of a small model, these and the slices of `_Reader` are most of the time to load it.

    Yields:
        Nothing.
    """
    before = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    vars(gguf).update(
        GGUFReader=functools.cache(_Reader), get_tensor_name_map=functools.cache(gguf.get_tensor_name_map)
    )
    try:
        yield
    finally:
        vars(gguf).update(before)


class _Reader(gguf.GGUFReader):
    """Slices the file into plain arrays: a slice of a memory map, one for each word of a vocabulary, takes longer."""

    @property
    def data(self) -> Any:
        """The file."""
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)
