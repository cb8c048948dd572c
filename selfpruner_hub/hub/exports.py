"""Exports that are made for publishing; the exporters are imported when they are used."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.hub.bundle import ONNX, check_export
from selfpruner_hub.hub.space import DENSE
from selfpruner_hub.provenance import check_parent, revision_of
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, read_export
from selfpruner_hub.storage.model_record import Record, read_record
from selfpruner_hub.storage.staging import save_directory


def make_exports(directory: Path, formats: Sequence[str], *, static: bool = False, parent: str | None = None) -> None:
    """Export a saved model for publishing, each format into a folder of its name; exports of this model are kept.

    Args:
        directory: Directory of the model.
        formats: Formats of the exports.
        static: Whether a static Space needs ONNX graphs of the model, and of the dense parent beside them.
        parent: Directory or Hub repository of the parent; None takes the one that the record names.
    """
    from exporters.export import export  # it imports this package
    from exporters.format import export_format

    record = read_record(directory)
    for name in dict.fromkeys((*formats, *([ONNX] if static else []))):
        target, options = directory / name, export_format(name).published
        if target.exists():
            try:
                current = check_export(directory, name, record).options
                if all(current.get(option) == value for option, value in options.items()):
                    continue
            except SavedModelError:
                read_export(target, name)  # fails where it is no export of this package, so it is not deleted
        with tempfile.TemporaryDirectory(dir=directory, prefix=".") as temporary:
            made = export(directory, name, Path(temporary) / name, **options)
            if target.exists():  # an earlier export is there until the new one is
                shutil.rmtree(target)
            made.replace(target)
    if static:
        _export_parent(directory / ONNX / DENSE, record, parent)


def _export_parent(target: Path, record: Record, copied: str | None) -> None:
    """Make the graphs of a dense parent, or of a copy of it, without the one in float32, unless they are there."""
    if target.exists():
        return
    from exporters.export import export  # it imports this package
    from exporters.format import export_format

    parent = copied or record.base_model
    loading = revision_of(record, parent)
    with tempfile.TemporaryDirectory() as temporary, save_directory(target) as staging:
        graphs = export(parent, ONNX, Path(temporary) / DENSE, loading=loading, **export_format(ONNX).published)
        check_parent(record, read_export(graphs).source, parent)
        for path in (graphs / EXPORT_RECORD_FILE, *(graphs / ONNX).iterdir()):
            if not path.name.startswith("model.onnx"):
                shutil.move(path, staging)
