"""Export of a model to another format, compared with PyTorch and described by a record."""

from __future__ import annotations

import math
import mmap
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters.format import ExportFormat, export_format
from exporters.writer import Written
from selfpruner_hub.errors import ExportError, OutputError, SavedModelError, UserError
from selfpruner_hub.models.architectures import is_stock
from selfpruner_hub.models.loading import load_model, resolve_directory
from selfpruner_hub.models.patching import working_on
from selfpruner_hub.models.weights import converted, identity_of
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, ExportRecord, read_export
from selfpruner_hub.storage.layout import EXPORTED
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, Record, read_record
from selfpruner_hub.storage.staging import check_replaceable, check_writable, output_path, save_directory

EXPORTING, STAGES = "exporting", ("loading", "writing", "comparing with PyTorch")


def _silent(*_told: object) -> None:
    """Report nothing."""


def export(
    name: str | Path,
    to: str,
    output: str | Path,
    *,
    tolerance: float | None = None,
    loading: Any = None,
    overwrite: bool = False,
    progress: Callable[..., None] = _silent,
    **options: Any,
) -> Path:
    """Load a model, dense or pruned, and write it in another format.

    Args:
        name: Directory or Hub repository of the model.
        to: Format, a key of `storage.layout.EXPORTS`.
        output: Directory of the export; files with the same names are replaced.
        tolerance: Largest allowed distance of a logit from PyTorch's in float32; None takes the format's default, and
            infinity compares nothing.
        loading: Keyword arguments of transformers' `from_pretrained`: revision, token, gguf_file, …
        overwrite: Whether to replace a model that is no export.
        progress: Callback, called with (what, done, total, note).
        **options: Options of the format.

    Returns:
        `output`, which now holds the export, tokenizer, generation configuration, `selfpruner_export.json`, and the
        record of a pruned model.

    Raises:
        UserError: The format, an option, the model or the output is wrong, or a library is missing.
        ExportError: The export differs from the PyTorch model; its files are deleted.
    """
    name, keywords = str(name), {"dtype": torch.float32, **(loading or {})}
    if output and Path(name).is_dir() and Path(output).exists() and Path(output).samefile(name):
        raise OutputError("The output would replace the model that is exported.", "Choose another output.")
    _check(to, options, output, overwrite, tolerance)  # before the slow loading of the model
    progress(EXPORTING, 0, len(STAGES), STAGES[0])
    model, tokenizer = load_model(name, device="cpu", **keywords)
    pruned = not is_stock(model) or (Path(name) / MODEL_RECORD_FILE).is_file()  # a uniform model is a stock one
    record = read_record(resolve_directory(name, **keywords)) if pruned else None
    called = Path(name).resolve().name if Path(name).exists() else name
    details: dict[str, Any] = {"name": called, "record": record, "tolerance": tolerance, "progress": progress}
    return export_model(model, tokenizer, to, output, overwrite=overwrite, consume=True, **details, **options)


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    to: str,
    output: str | Path,
    *,
    name: str = "",
    record: Record | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    progress: Callable[..., None] = _silent,
    consume: bool = False,
    **options: Any,
) -> Path:
    """Write a model that is in memory in another format; `export` has the arguments.

    Args:
        model: Model of any dtype on any device; it is not changed unless `consume` is set.
        tokenizer: Tokenizer to save with the export; None saves none.
        to: Format, a key of `storage.layout.EXPORTS`.
        output: Directory of the export.
        name: Name of the model, for the record.
        record: Record of a pruned model, saved with the export.
        tolerance: Largest allowed distance of a logit from PyTorch's in float32; None takes the format's default, and
            infinity compares nothing.
        overwrite: Whether to replace a model that is no export.
        progress: Callback, called with (what, done, total, note).
        consume: Flag to free the model's weights once they are written, before the runtime loads them again.
        **options: Options of the format.

    Returns:
        `output`.

    Raises:
        UserError: The format, an option or the output is wrong, a library is missing, or another thread works on the
            model.
        ExportError: The export differs from the PyTorch model; its files are deleted.
    """
    form, output = _check(to, options, output, overwrite, tolerance)
    with working_on(model):
        if model.dtype != torch.float32 or model.device.type != "cpu":
            model, consume = converted(model, torch.float32, "cpu"), True
        source = {"name": name, **identity_of(model)}
        with save_directory(output, stale=_stale(output, source)) as staging:
            _save_companions(model, tokenizer, record, staging)
            progress(EXPORTING, 1, len(STAGES), STAGES[1])
            with _consumed(model) if consume else nullcontext():
                written = _allowing(tolerance, form.write(model, tokenizer, staging, **options))
                measure = written.compare() if written.compare is not None else None
            progress(EXPORTING, 2, len(STAGES), STAGES[2])
            difference = measure() if measure is not None else None
            _check_difference(to, written, difference)
            sidecar = _export_record(to, source, written, difference)
            (staging / EXPORT_RECORD_FILE).write_text(sidecar.to_json(), encoding="utf-8")
    progress(EXPORTING, len(STAGES), len(STAGES), "done")
    return output


def _stale(output: Path, source: dict[str, Any]) -> tuple[str, ...]:
    """Files of an earlier export in the output, if it is of another model: nothing tells them from the new ones."""
    if not (output / EXPORT_RECORD_FILE).is_file():
        return ()
    try:
        earlier = read_export(output).source
    except SavedModelError:  # damaged, or of another version
        return EXPORTED
    return () if all(earlier.get(name) == value for name, value in source.items() if name != "name") else EXPORTED


def _save_companions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, record: Record | None, staging: Path
) -> None:
    """Save what every format has beside its own files: tokenizer, generation settings, record of a pruned model."""
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(staging)
    if record is not None:
        (staging / MODEL_RECORD_FILE).write_text(record.to_json(), encoding="utf-8")


def _allowing(tolerance: float | None, written: Written) -> Written:
    """Apply the tolerance that was asked for; infinity compares nothing, and keeps the format's own in the record."""
    if tolerance is None:
        return written
    if tolerance == math.inf:
        return replace(written, compare=None, unchecked=written.unchecked or "any difference was allowed")
    return replace(written, tolerance=tolerance)


def _check_difference(to: str, written: Written, difference: float | None) -> None:
    """Raise `ExportError` where the export differs from the PyTorch model by more than is allowed."""
    if difference is not None and not difference <= written.tolerance:  # NaN too
        raise ExportError(
            f"The {to} export differs from the PyTorch model by {difference:.2g} in a {written.compared}; "
            f"{written.tolerance:.2g} is allowed.",
            "Allow more with a larger tolerance, or choose a wider dtype.",
        )


def _export_record(to: str, source: dict[str, Any], written: Written, difference: float | None) -> ExportRecord:
    libraries = ("selfpruner-hub", "torch", "transformers", *written.libraries)
    return ExportRecord(
        format=to,
        options=written.options,
        source=source,
        versions={"python": platform.python_version(), **{library: version(library) for library in libraries}},
        tolerance=written.tolerance,
        max_difference=difference,
        unchecked=written.unchecked,
        remark=written.remark,
    )


@contextmanager
def _consumed(model: nn.Module) -> Iterator[None]:
    """Free the memory of a model's weights at the end, because the runtime is about to load them again.

    torch's traces keep references to the parameters and their aliases, and tensors shared with NumPy cannot be resized.
    So the weights are moved into one memory mapping, whose pages are released at the end. The tensors stay, filled with
    zeros.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        yield
        return
    tensors = list(model.parameters())
    size = sum(_aligned(tensor.nbytes) for tensor in tensors)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    at = 0
    for tensor in tensors:
        place = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=at).view_as(tensor)
        tensor.data = place.copy_(tensor.data)
        at += _aligned(tensor.nbytes)
    yield
    pages.madvise(mmap.MADV_DONTNEED)


def _aligned(size: int) -> int:
    """Round a size up to whole cache lines, in bytes."""
    return -(-size // 64) * 64


def _check(
    to: str, options: dict[str, Any], output: str | Path, overwrite: bool, tolerance: float | None
) -> tuple[ExportFormat, Path]:
    """Return the format, and the output; refuse options and outputs that do not work."""
    form = export_format(to)
    names = [option.name for option in form.options]
    if unknown := sorted(set(options) - set(names)):
        raise UserError(f"An export to {to} has no option {unknown[0]!r}.", f"It takes {', '.join(names)}.")
    if tolerance is not None and not tolerance >= 0:  # NaN too
        raise UserError(f"tolerance must be a number of at least 0; got {tolerance!r}.")
    place = output_path(output)
    check_writable(place)
    check_replaceable(place, EXPORT_RECORD_FILE, overwrite)
    return form, place
