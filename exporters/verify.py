"""Comparison of an export with its PyTorch model on a user's own prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from exporters.format import export_format
from exporters.opened import Expected, chosen, continued
from selfpruner_hub.errors import ExportError, ModelError, SavedModelError, UserError
from selfpruner_hub.models.loading import is_repo_id, load_model
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.storage.export_record import ExportRecord, read_export
from selfpruner_hub.storage.layout import EXPORTS

VERIFYING = "verifying"
HASHES = ("configuration", "weights")
"""Parts of the identity of a model that mean nothing to a reader."""


@dataclass(frozen=True)
class Comparison:
    """A file of an export beside the PyTorch model."""

    file: str
    tokens: list[int]
    """Its greedy tokens after the prompt."""
    text: str
    differs_at: int | None
    """Index of the first of these tokens that is not PyTorch's; None if all are."""
    measured: str
    """Quantity that is compared: `"logit"`, `"log-probability"` or `"KL divergence"`."""
    difference: float
    """Largest distance from PyTorch in float32, on the prompt and on PyTorch's greedy tokens; NaN if any is not finite.
    Where weights are rounded: in GGUF, of tokens that are likely in PyTorch; in ONNX, the mean divergence in nats from
    the PyTorch model with weights that are rounded in the same way."""
    tolerance: float
    """Largest allowed distance, from the record of the export."""


@dataclass(frozen=True)
class Verification:
    """An export beside its PyTorch model on a prompt."""

    model: str
    prompt: str
    tokens: list[int]
    """PyTorch's greedy tokens after the prompt."""
    text: str
    files: list[Comparison]

    @property
    def failure(self) -> ExportError | None:
        """The error of the first file that differs by more than its tolerance; None if there is none."""
        for file in self.files:
            if not file.difference <= file.tolerance:  # NaN too
                return ExportError(
                    f"{file.file} differs from the PyTorch model by {file.difference:.2g} in a {file.measured}; "
                    f"{file.tolerance:.2g} is allowed.",
                    "Export the model again; if it is the same then, this prompt needs a wider dtype.",
                )
        return None


def verify(
    directory: Path,
    prompt: str,
    new_tokens: int,
    model: str | None = None,
    *,
    loading: dict[str, Any] | None = None,
    progress: Callable[..., None] = lambda *_: None,
) -> Verification:
    """Run an export and its PyTorch model on a prompt.

    Args:
        directory: Directory of the export.
        prompt: Text that both continue.
        new_tokens: Largest number of greedy tokens after it, at least 1.
        model: Directory or Hub repository of the PyTorch model; None looks for the one that the record names.
        loading: Keyword arguments of transformers' `from_pretrained` for it: revision, gguf_file, …
        progress: Callback, called with (what, done, total, note).

    Returns:
        Both sides; `failure` says whether they differ by more than the record allows.

    Raises:
        UserError: There is no export or no model, the model is another one, the prompt does not fit, or the runtime is
            missing.
        ExportError: llama.cpp reads the prompt as other tokens than the model does.
    """
    if new_tokens < 1:
        raise UserError(f"At least one new token is needed; got {new_tokens}.")
    form = export_format(read_export(directory).format)
    record = form.read(directory)
    form.check_runs(record)
    name = model or _find_model(directory, record)
    progress(VERIFYING, 0, 3, "loading the model")
    loaded, tokenizer = load_model(name, device="cpu", **{"dtype": torch.float32, **(loading or {})})
    _check_same(loaded, record, name)
    if tokenizer is None:
        raise ModelError(f"{name!r} has no tokenizer, and a prompt needs one.", "Copy the model's tokenizer beside it.")
    ids: list[int] = tokenizer(prompt)["input_ids"]
    _check_length(ids, new_tokens, form.context(record, loaded.config))
    progress(VERIFYING, 1, 3, "running PyTorch")
    end = _end_tokens(loaded)
    expected = Expected(prompt, ids, tokenizer, new_tokens, end, continued(loaded, ids, new_tokens, end))
    files = list(form.files(directory, record, loaded.config, len(ids) + new_tokens))
    references = [expected.of(file.reference(loaded)) if file.reference else expected for file in files]
    del loaded  # one model in memory at a time
    tokens, compared = chosen(expected.passes), []
    for file, reference in zip(files, references, strict=True):
        progress(VERIFYING, 2, 3, f"running {file.name}")
        opened = file.open()
        theirs, distance = opened.tokens(expected), opened.difference(reference)
        differs = next((i for i, (a, b) in enumerate(zip_longest(theirs, tokens)) if a != b), None)
        text = str(tokenizer.decode(theirs))
        compared.append(Comparison(file.name, theirs, text, differs, opened.measured, distance, file.tolerance))
    progress(VERIFYING, 3, 3, "done")
    return Verification(name, prompt, tokens, str(tokenizer.decode(tokens)), compared)


def _find_model(directory: Path, record: ExportRecord) -> str:
    """Find the model that the record names: around the export, beside it, here, or on the Hub."""
    name, home = record.source["name"], directory.resolve().parent
    around = [home] if directory.resolve().name in EXPORTS else []
    for place in (*around, *([home / name, Path(name)] if name else [])):
        if (place / "config.json").is_file():
            return str(place)
    if is_repo_id(name):
        return str(name)
    raise ModelError(
        f"The model that was exported{f' ({name})' if name else ''} is not beside the export.",
        "Name its directory or Hub repository with --model.",
    )


def _check_same(model: PreTrainedModel, record: ExportRecord, name: str) -> None:
    """Refuse another model than the one that was exported."""
    for key, value in identity_of(model).items():
        if record.source.get(key) != value:
            difference = f"other {key}" if key in HASHES else f"{key} {value}, not {record.source.get(key)}"
            raise SavedModelError(
                f"{name!r} is not the model that was exported: it has {difference}.",
                "Name that model with --model, or export this one.",
            )


def _check_length(ids: list[int], new_tokens: int, longest: int) -> None:
    if not ids:
        raise UserError("The prompt has no tokens.", "Give some text with --prompt.")
    if len(ids) + new_tokens > longest:
        raise UserError(
            f"The prompt has {len(ids)} tokens; with {new_tokens} new ones they are more than the {longest} that "
            "the export takes.",
            "Give a shorter prompt, or fewer --new-tokens.",
        )


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(end if isinstance(end, list) else [] if end is None else [end])
