"""The registry of formats: how a model is written in each, run in its runtime, and compared with PyTorch.

A format is a package whose `FORMAT` says all that the rest needs: the export, `selfpruner verify`, the benchmark, the
costs of a target, publishing, and the command line. Neither this module nor those entries import a library.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.writer import FormatWriter, require
from selfpruner_hub.errors import SavedModelError, UserError
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, ExportRecord, read_export
from selfpruner_hub.storage.layout import EXPORTS, known_export
from selfpruner_hub.storage.versioned_json import fits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from exporters.opened import File
    from exporters.runtime import Runner, Setting


@dataclass(frozen=True)
class Option:
    """An option of an export: a keyword of the writer, and an option of `selfpruner export`."""

    name: str
    help: str
    type: Callable[[str], Any] = str
    metavar: str | None = None


DTYPE = Option("dtype", "of the weights, in the format's words: float32, float16, int8, q4_k_m, …")
"""The option that most formats have."""


@dataclass(frozen=True)
class OtherPython:
    """How models are timed by a library that excludes ours, in an environment of its own."""

    program: Path
    """Script that answers the requests of a `Worker`."""
    versions: Callable[[str | Path | None], dict[str, str]]
    """Versions of the libraries in the environment of a Python, by name."""
    staged: Callable[[str, PreTrainedConfig, dict[str, Any], Path], str]
    """Lays out a model for the other Python: name, configuration, keywords for loading it, directory to make."""

    @staticmethod
    def environment() -> dict[str, str]:
        """Variables of this process, without any that would show another Python the packages of this one."""
        return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _context_of_model(record: ExportRecord, config: PreTrainedConfig) -> int:
    return int(config.max_position_embeddings)


@dataclass(frozen=True)
class Format:
    """A format of models, with the runtime that loads it; `later` keeps the libraries out of its functions.

    An `ExportFormat` is written; of a plain one, PyTorch's files or the exports of another format are loaded.
    """

    name: str
    title: str
    """Name of the runtime for readers."""
    library: str = ""
    """Module that runs it here; empty where none is needed, or one of several."""
    extra: str = ""
    """Extra of this package that installs the library."""
    libraries: tuple[str, ...] = ()
    """Distributions whose versions a benchmark records."""

    load: Callable[[str, Setting], Runner] | None = None
    """Loads a model, or its export, for a benchmark."""
    dtypes: Callable[[], Mapping[str, tuple[float, float]]] = dict
    """Bytes of a weight and of a KV-cache element, by dtype; the first dtype is the default of a benchmark."""
    exported: Callable[[Setting], dict[str, Any]] | None = None
    """Options of an export that is made for a benchmark; None for a runtime that loads PyTorch's files."""
    export_format: str = ""
    """Format of these exports; empty for this one."""
    device: str = "cpu"
    """Default device of a benchmark."""
    on_gpu: bool = False
    """Whether a target is measured on the CUDA device of a model that is on one."""
    batches: tuple[int, ...] = (1,)
    """Default batch sizes of a benchmark."""
    batched: bool = True
    """Whether it can run several prompts at a time."""
    scored: bool = True
    """Whether it can measure the perplexity of text."""
    metered: bool = False
    """Whether targets can be measured in it."""
    elsewhere: OtherPython | None = None
    """The other Python that runs it, if it is not this one."""

    @property
    def runs(self) -> bool:
        """Whether it is a runtime that models can be timed in."""
        return self.load is not None or self.elsewhere is not None

    def versions_elsewhere(self, python: str | Path | None) -> dict[str, str]:
        """Read the versions of the other Python, if there is one.

        Args:
            python: Path of the Python of a runtime that has an environment of its own, else None.

        Returns:
            Versions of the libraries there, by name; none for a runtime of this Python.

        Raises:
            UserError: The path is missing or not wanted, or the runtime is not there.
        """
        if self.elsewhere is not None:
            return self.elsewhere.versions(python)
        if python is not None:
            raise UserError(f"{self.name} runs in this Python.", "Leave --python out.")
        return {}


@dataclass(frozen=True, kw_only=True)
class ExportFormat(Format):
    """A format that models are exported to."""

    write: FormatWriter
    """Writer of the format."""
    files: Callable[[Path, ExportRecord, PreTrainedConfig, int], Iterable[File]]
    """Files of an export, for comparison: from its directory, record and configuration, and the longest sequence."""
    options: tuple[Option, ...] = ()
    """Options of an export, in the order of the writer's keywords."""
    recorded: Any = dict[str, Any]
    """Type of the options that are read back from the record of an export."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """Options of an export that is made for publishing."""
    check: Callable[[ExportRecord], None] | None = None
    """Refuses an export that cannot run here; None looks for `library`."""
    context: Callable[[ExportRecord, PreTrainedConfig], int] = _context_of_model
    """Longest sequence that an export takes, in tokens."""

    def read(self, directory: Path) -> ExportRecord:
        """Read the record of an export in this format.

        Args:
            directory: Directory of the export.

        Returns:
            The record.

        Raises:
            SavedModelError: The directory holds no export, one of another format, or a damaged record.
        """
        record = read_export(directory, self.name)
        if not fits(record.options, self.recorded):
            raise SavedModelError(
                f"{directory / EXPORT_RECORD_FILE} is damaged: its options do not say how it was written.",
                "Export again.",
            )
        return record

    def check_runs(self, record: ExportRecord) -> None:
        """Refuse an export that cannot run here, before its model is loaded.

        Args:
            record: Record of the export.

        Raises:
            UserError: The library or the GPU that it needs is not here.
            SavedModelError: The export is for another machine.
        """
        if self.check is not None:
            self.check(record)
        elif self.library:
            require(self.library, self.extra)


def later(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module, which is imported when the function is called."""

    def call(*values: Any, **keywords: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*values, **keywords)

    return call


def entry(package: str) -> Format:
    """Import the package of a format, and return its entry."""
    attribute: Format = importlib.import_module(package).FORMAT
    return attribute


class Formats(Mapping[str, Format]):
    """Formats by name; the package of a format is imported when the format is looked up.

    Args:
        *packages: Packages by the name of their format; each has a `FORMAT`.
    """

    def __init__(self, *packages: Mapping[str, str]) -> None:
        self._packages = packages

    def package(self, name: str) -> str:
        """Name of the package of a format; raise `KeyError` for another name."""
        for packages in self._packages:
            if name in packages:
                return packages[name]
        raise KeyError(name)

    def __getitem__(self, name: str) -> Format:
        return entry(self.package(name))

    def __iter__(self) -> Iterator[str]:
        for packages in self._packages:
            yield from packages

    def __len__(self) -> int:
        return sum(map(len, self._packages))


FORMATS = Formats({"torch": "exporters.pytorch"}, EXPORTS, {"genai": "exporters.genai", "vllm": "exporters.vllm"})
"""All formats. Those of exports are listed in `storage.layout`: the layers below this one know their folders."""


def export_format(name: str) -> ExportFormat:
    """Return a format that can be written; raise `UserError` for another name."""
    form: ExportFormat = importlib.import_module(EXPORTS[known_export(name)]).FORMAT
    return form


def runtimes() -> tuple[str, ...]:
    """Names of the formats that models can be timed in."""
    return tuple(name for name, row in FORMATS.items() if row.runs)


def metered() -> tuple[str, ...]:
    """Names of the runtimes that targets can be measured in."""
    return tuple(name for name, row in FORMATS.items() if row.metered)
