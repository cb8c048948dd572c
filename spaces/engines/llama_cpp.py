"""The two models in llama.cpp."""

from __future__ import annotations

import tempfile
from pathlib import Path

from model_source import record, shown

from engines.base import FLOAT32, Engine, Receive, check_size, or_say, threads_text, warm

LONGEST = 4_096
"""Longest prompt and answer together, because llama.cpp takes the memory of its cache at once, in tokens."""


class LlamaCppEngine:
    """A GGUF file in llama.cpp.

    Args:
        path: Path of the file, `model-DTYPE.gguf`.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        from exporters.to_gguf.llama_cpp import LlamaCpp

        fields = GGUFReader(path).fields
        trained = fields[f"{fields['general.architecture'].contents()}.context_length"].contents()
        self.longest = min(trained, LONGEST)
        self.dtype = path.stem.removeprefix("model-")
        self._model = LlamaCpp(path, self.longest)

    @property
    def runtime(self) -> str:
        """Runtime, dtype and threads, in words."""
        return f"llama.cpp, {self.dtype}, {threads_text(self._model.threads)}"

    def write(self, ids: list[int], tokens: int, receive: Receive) -> None:
        """Generate; see `Engine.write`."""
        self._model.stream(ids, tokens, receive)


def load(name: str) -> dict[str, Engine]:
    """Load the published GGUF file, and the dense parent, which is converted to a file of the same dtype."""
    with or_say("llama.cpp is not installed here."):
        import xllamacpp  # noqa: F401  LlamaCpp imports it

        from exporters.export import export
    with or_say("The published GGUF file cannot be loaded."):
        path = shown().file(name)
        check_size("The pruned model", path.stat().st_size)
        pruned = warm(LlamaCppEngine(path))
    check_size("For a conversion to GGUF, the dense model", int(record()["parameters"]["dense"]) * FLOAT32)
    with (
        or_say("The dense model cannot be converted to GGUF here."),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        loading = {"revision": shown().parent_revision}
        options = {"dtype": pruned.dtype, "tokenizer_from": str(path), "loading": loading}
        directory = export(shown().parent, "gguf", Path(folder) / "gguf", **options)
        dense = warm(LlamaCppEngine(directory / path.name))  # llama.cpp maps the deleted file
        return {"pruned": pruned, "dense": dense}
