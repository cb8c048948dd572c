"""The files of a saved model that are published: model, plots of its search, exports. Incomplete models are refused."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.hub.card import CHAT_TEMPLATE, WEIGHTS_OF_GRAPHS
from selfpruner_hub.hub.space import DENSE, GGUF
from selfpruner_hub.models.architectures import architecture_of
from selfpruner_hub.models.loading import load_config, load_model
from selfpruner_hub.models.weights import configuration_hash, identity_of, saved_hash
from selfpruner_hub.search.journal import JOURNAL_FILE
from selfpruner_hub.storage.export_record import ExportRecord, read_export
from selfpruner_hub.storage.layout import EXPORTS, MODEL_CODE, PLOTS, TEMPLATES, TOKENIZER, weight_files
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, Record, read_record

CARD = "README.md"
NEEDED = ("config.json", MODEL_RECORD_FILE)
PATTERNS = (
    *(*NEEDED, MODEL_CODE),
    *("model*.safetensors", "model.safetensors.index.json", "generation_config.json", JOURNAL_FILE),
    *(*TOKENIZER, *TEMPLATES, "additional_chat_templates/*.jinja"),
)
"""Names of the files that publishing writes to a repository, beside the card, the plots and the exports. Other files of
the directory are not uploaded, and other files of the repository are not changed."""
ONNX = "onnx"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
"""Patterns of files that are also published, where the directory has them; they are never deleted from a repository."""


@dataclass(frozen=True)
class Bundle:
    """Files of one saved model by their path in a repository, without the cards."""

    record: Record
    files: dict[str, Path]
    pictures: dict[str, bytes]
    exports: tuple[str, ...]
    """Formats of the exports; each is a folder of `files`."""
    graphs: dict[str, Path]
    """Files for ONNX Runtime GenAI and Transformers.js, by their path in a repository of their own."""

    @property
    def chat(self) -> bool:
        """Whether the model has a chat template."""
        return CHAT_TEMPLATE in self.files

    @property
    def has_dense_graphs(self) -> bool:
        """Whether the graphs of the dense parent are beside the model's."""
        return any(name.startswith(f"{DENSE}/") for name in self.graphs)

    @property
    def weights(self) -> dict[str, Path]:
        """Files of the weights, from which exports are made."""
        return {name: path for name, path in self.files.items() if fnmatch(name, "model*.safetensors")}


def collect(directory: Path) -> Bundle:
    """Collect the files of a saved model that are published.

    Args:
        directory: Directory of a saved model; its exports are in folders that are named after their formats.

    Returns:
        The files, with plots drawn from the journal.

    Raises:
        SavedModelError: The model or one of its exports is incomplete, or an export is of another model.
    """
    record = read_record(directory)
    files = _matching(directory, (*PATTERNS, *LICENCES))
    _check_whole(directory, files, NEEDED if record.stock else (*NEEDED, MODEL_CODE))
    if record.weights and record.weights != saved_hash(directory):
        raise SavedModelError(
            f"The weights in {str(directory)!r} were changed after they were saved, and the record has the figures of "
            "the former ones.",
            "Say how they were changed: PrunedModel.from_pretrained(DIR), its method retrained, and save_pretrained.",
        )
    exports, graphs = [], {}
    for name in EXPORTS:
        if not (directory / name).is_dir():
            continue
        if check_export(directory, name, record).has_hub_layout:
            graphs = _within(directory / name, directory / name)
        else:
            exports.append(name)
            files |= _within(directory / name, directory)
    return Bundle(record, files, _pictures(directory), tuple(exports), graphs)


def check_export(directory: Path, name: str, record: Record) -> ExportRecord:
    """Read the record of an export; refuse one that was not made from this model.

    Args:
        directory: Directory of the model.
        name: Format of the export, which names its folder.
        record: Record of the model.

    Returns:
        The record of the export.

    Raises:
        SavedModelError: The folder holds no export, one of another format or of another model, or not a whole one.
    """
    export = read_export(directory / name, name)
    if not is_export_of(directory / name, directory, record):
        raise SavedModelError(
            f"{str(directory / name)!r} is an export of another model than {str(directory)!r} holds.",
            f"Delete it, then push with --with {name}.",
        )
    files = _within(directory / name, directory / name)
    needed = ["*.gguf"] if name == GGUF else []
    if export.has_hub_layout:
        needed = [f"{ONNX}/model{suffix}.onnx{data}" for suffix in WEIGHTS_OF_GRAPHS for data in ("", "_data")]
    if missing := [pattern for pattern in needed if not any(fnmatch(file, pattern) for file in files)]:
        raise SavedModelError(
            f"{str(directory / name)!r} lacks {missing[0]}.", f"Push with --with {name} to make it anew."
        )
    return export


def is_export_of(folder: Path, directory: Path, record: Record) -> bool:
    """Return whether an export was made from a saved model: by their records, and by weights and configuration.

    Args:
        folder: Directory of the export.
        directory: Directory of the model.
        record: Record of the model.

    Returns:
        Whether it was.

    Raises:
        SavedModelError: The folder holds no export of a pruned model, or the model is damaged.
    """
    if not same_model(read_record(folder), record):
        return False
    source = read_export(folder).source
    return _saved_identity(directory) == (source.get("weights"), source.get("configuration"))


def _saved_identity(directory: Path) -> tuple[str, str]:
    """Hashes of the weights and of the configuration of a saved model."""
    config = load_config(str(directory))
    if architecture_of(config).experts is not None:  # files of a mixture may have a tensor per expert
        identity = identity_of(load_model(str(directory), device="cpu")[0])
        return identity["weights"], identity["configuration"]
    return saved_hash(directory), configuration_hash(config)


def same_model(one: Record, other: Record) -> bool:
    """Return whether two records are of the same run: later measurements change none."""
    return replace(one, metrics={}, weights="") == replace(other, metrics={}, weights="")


def is_ours(name: str) -> bool:
    """Return whether publishing writes a file of this path in a repository."""
    folder = name.partition("/")[0]
    return (
        "/" in name
        and folder in (PLOTS, *EXPORTS)
        or any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in PATTERNS)
    )


def _matching(directory: Path, patterns: Iterable[str]) -> dict[str, Path]:
    paths = (path for pattern in patterns for path in sorted(directory.glob(pattern)) if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in paths}


def _within(folder: Path, root: Path) -> dict[str, Path]:
    """Return the files below a folder by their path from `root`, without hidden ones."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): path for path in paths}


def _check_whole(directory: Path, files: dict[str, Path], needed: Sequence[str]) -> None:
    weights = weight_files(directory)
    if missing := [name for name in (*needed, *weights) if name not in files]:
        raise SavedModelError(f"{str(directory)!r} is not a whole model: {missing[0]} is missing.", "Save it again.")
    for name in weights:
        try:
            with safe_open(files[name], framework="numpy"):
                pass  # opening compares the header with the size of the file
        except (SafetensorError, OSError) as error:
            raise SavedModelError(f"{files[name]} is damaged or cut off.", "Save the model again.") from error


def _pictures(directory: Path) -> dict[str, bytes]:
    """Draw the plots as PNGs, by their path in the repository; none where there is no journal."""
    journal = directory / JOURNAL_FILE
    if not journal.is_file() or not journal.stat().st_size:
        return {}
    from selfpruner_hub.hub.plots import plot_search  # matplotlib takes half a second, which every command would wait

    with tempfile.TemporaryDirectory() as temporary:
        files = plot_search(directory, Path(temporary), formats=("png",))
        return {f"{PLOTS}/{path.name}": path.read_bytes() for path in files}
