"""GGUF files in llama.cpp, timed, and opened for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gguf import GGML_QUANT_SIZES
from torch import Tensor
from transformers import PreTrainedConfig

from exporters.opened import Expected, File
from exporters.runtime import Measured, Setting
from exporters.to_gguf import FORMAT
from exporters.to_gguf.dtypes import GGUF_DTYPES
from exporters.to_gguf.library import gguf_cross_entropy
from exporters.to_gguf.llama_cpp import GreedyStep, LlamaCpp, check_tokens, gguf_difference
from exporters.to_gguf.writer import context_length
from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.storage.export_record import ExportRecord

DEFAULT = "f16"
"""Dtype of a benchmark."""


def dtypes() -> dict[str, tuple[float, float]]:
    """Bytes of a weight and of a KV-cache element, by dtype; see `Format.dtypes`.

    A K-quant has the bits of most of its matrices; a file has finer matrices too, and others where 256 divides no row.
    llama.cpp's KV cache is always float16.
    """
    names = (DEFAULT, *(name for name in GGUF_DTYPES if name != DEFAULT))
    sizes = {name: GGML_QUANT_SIZES[GGUF_DTYPES[name].tensor] for name in names}
    return {name: (size / block, 2) for name, (block, size) in sizes.items()}


def context(record: ExportRecord, config: PreTrainedConfig) -> int:
    """Longest sequence for which a file is exact, in tokens; see `ExportFormat.context`."""
    return context_length(config)


def load(name: str, setting: Setting) -> LlamaCppRunner:
    """Load an export for a benchmark; see `Format.load`."""
    directory = Path(name)
    return LlamaCppRunner(directory / _file_of(FORMAT.read(directory)), setting)


def files(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> Iterator[File]:
    """Yield the file; see `ExportFormat.files`."""
    name, converted = _file_of(record), not record.options["tokenizer_from"]
    run, rounded = (
        partial(LlamaCpp, directory / name, longest + 8, exact=True),
        GGUF_DTYPES[record.options["dtype"]].quantised,
    )
    yield File(name, record.tolerance, lambda: GgufFile(run(), rounded, converted))


def _file_of(record: ExportRecord) -> str:
    """Return the name of the file of an export."""
    dtype = record.options["dtype"]
    if dtype not in GGUF_DTYPES:
        raise SavedModelError(f"The record of the export names an unknown dtype {dtype!r}.")
    return f"model-{dtype}.gguf"


class LlamaCppRunner:
    """llama.cpp with its own timings, which leave out the server's time for requests and text.

    Args:
        path: Path of the GGUF file.
        setting: Length of the longest sequence, and number of threads.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        self.model = LlamaCpp(path, setting.longest, setting.threads)
        self._path, self._threads = path, setting.threads

    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Time a pass; see `Runner.measure`."""
        # `prompt_ms` includes the first new token; `predicted_ms` is the time of the others.
        timings = self.model.complete(ids[0].tolist(), new_tokens + 1, ignore_eos=True)["timings"]
        return Measured(timings["prompt_ms"], timings["predicted_ms"] / new_tokens)

    def cross_entropy(self, windows: Tensor) -> float:
        """Measure the loss on text; see `Runner.cross_entropy`."""
        return gguf_cross_entropy(self._path, windows, self._threads)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file in llama.cpp."""

    run: LlamaCpp
    rounded: bool
    converted: bool
    """Whether the file's tokenizer is the model's, converted."""

    @property
    def measured(self) -> str:
        """Quantity that is compared."""
        return "log-probability"

    def tokens(self, expected: Expected) -> list[int]:
        """Greedy tokens after the prompt."""
        tokens: list[int] = []
        while len(tokens) < expected.new_tokens and expected.end.isdisjoint(tokens[-1:]):
            if not (likeliest := self.run.likeliest([*expected.ids, *tokens])):
                break
            tokens.append(max(likeliest, key=likeliest.__getitem__))
        return tokens

    def difference(self, expected: Expected) -> float:
        """Largest distance from PyTorch."""
        if self.converted:
            check_tokens(self.run, expected.tokenizer, expected.prompt)
        ids, steps = list(expected.ids), []
        for step in expected.passes:
            steps.append(GreedyStep(list(ids), step.logits[0, -1].log_softmax(-1)))
            ids.append(int(step.next_tokens))
        return gguf_difference(steps, self.run, self.rounded)
