"""Comparison of an export with its PyTorch model on a user's own prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from exporters.parity import Step, divergence, greedy, logit_difference
from exporters.to_gguf.dtypes import DTYPES
from exporters.to_gguf.llama_cpp import Answer, LlamaCpp, check_tokens, difference
from exporters.to_gguf.writer import context_length
from exporters.to_onnx.causal_lm import OnnxCausalLM, default_options
from exporters.to_onnx.hub_layout import BITS, HubGraph, file_of
from exporters.to_onnx.matrix_bits import rounded
from exporters.to_onnx.writer import TOLERANCES
from exporters.to_openvino.causal_lm import GRAPH, OpenVinoCausalLM
from exporters.to_tensorrt.causal_lm import ENGINE, TensorRtCausalLM, check_fits
from exporters.writer import one_of, require
from selfpruner_hub.errors import ExportError, ModelError, SavedModelError, UserError
from selfpruner_hub.models.loading import is_repo_id, load_model
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.storage.export_record import ExportRecord, read_export
from selfpruner_hub.storage.layout import EXPORTS

VERIFYING = "verifying"
NEEDED = {"onnx": "onnxruntime", "openvino": "openvino", "gguf": "xllamacpp"}
"""Library that runs a format, where the extra of the format's name installs it."""
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
    """What is compared: `"logit"`, `"log-probability"` or `"KL divergence"`."""
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


@dataclass(frozen=True)
class _Expected:
    """The prompt, and what the PyTorch model says after it."""

    prompt: str
    ids: list[int]
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int
    end: frozenset[int]
    """Tokens that end the text."""
    passes: list[Step]
    rounded: dict[int, list[Step]]
    """What the model with matrices of so many bits says, by the bits that the export has."""


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
    record = read_export(directory)
    one_of("format", record.format, tuple(_OPENERS))
    _check_runtime(record)
    name = model or _find_model(directory, record)
    progress(VERIFYING, 0, 3, "loading the model")
    loaded, tokenizer = load_model(name, device="cpu", **{"dtype": torch.float32, **(loading or {})})
    _check_same(loaded, record, name)
    if tokenizer is None:
        raise ModelError(f"{name!r} has no tokenizer, and a prompt needs one.", "Copy the model's tokenizer beside it.")
    ids: list[int] = tokenizer(prompt)["input_ids"]
    _check_length(ids, new_tokens, loaded.config, record)
    progress(VERIFYING, 1, 3, "running PyTorch")
    end = _end_tokens(loaded)
    passes = _run(loaded, ids, new_tokens, end)
    in_bits = {bits: _run(rounded(loaded, bits), ids, new_tokens, end) for bits in _bits(record)}
    expected = _Expected(prompt, ids, tokenizer, new_tokens, end, passes, in_bits)
    config, compared = loaded.config, []
    del loaded  # one model in memory at a time
    tokens = _tokens(expected.passes)
    longest = len(ids) + new_tokens
    for file, tolerance, load in _OPENERS[record.format](directory, record, config, longest):
        progress(VERIFYING, 2, 3, f"running {file}")
        opened = load()
        own, distance = opened.tokens(expected), opened.difference(expected)
        differs = next((i for i, (a, b) in enumerate(zip_longest(own, tokens)) if a != b), None)
        text = str(tokenizer.decode(own))
        compared.append(Comparison(file, own, text, differs, opened.measured, distance, tolerance))
    progress(VERIFYING, 3, 3, "done")
    return Verification(name, prompt, tokens, str(tokenizer.decode(tokens)), compared)


def _check_runtime(record: ExportRecord) -> None:
    """Refuse an export that cannot run here, before the model is loaded."""
    if record.format == "gguf" and record.options["dtype"] not in DTYPES:
        raise SavedModelError(f"The record of the export names an unknown dtype {record.options['dtype']!r}.")
    if record.format == "tensorrt":
        check_fits(record)
    elif record.format in NEEDED:
        require(NEEDED[record.format], record.format)


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
            shown = f"other {key}" if key in HASHES else f"{key} {value}, not {record.source.get(key)}"
            raise SavedModelError(
                f"{name!r} is not the model that was exported: it has {shown}.",
                "Name that model with --model, or export this one.",
            )


def _check_length(ids: list[int], new_tokens: int, config: PreTrainedConfig, record: ExportRecord) -> None:
    if not ids:
        raise UserError("The prompt has no tokens.", "Give some text with --prompt.")
    longest = config.max_position_embeddings
    if record.format == "gguf":
        longest = context_length(config)
    longest = record.options.get("context", longest)
    if len(ids) + new_tokens > longest:
        raise UserError(
            f"The prompt has {len(ids)} tokens; with {new_tokens} new ones they are more than the {longest} that "
            "the export takes.",
            "Give a shorter prompt, or fewer --new-tokens.",
        )


def _bits(record: ExportRecord) -> set[int]:
    """Bits of the matrices of an ONNX export, where they are rounded."""
    if record.format != "onnx":
        return set()
    return set(BITS.values()) if record.has_hub_layout else {BITS[d] for d in (record.options["dtype"],) if d in BITS}


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(end if isinstance(end, list) else [] if end is None else [end])


def _run(model: Callable[..., Any], ids: list[int], new_tokens: int, end: frozenset[int]) -> list[Step]:
    prompt = torch.tensor([ids])
    return greedy(model, prompt, torch.ones_like(prompt), new_tokens - 1, end)


def _tokens(passes: list[Step]) -> list[int]:
    return [int(step.next_tokens) for step in passes]


@dataclass(frozen=True)
class _Graph:
    """A model with the interface of a transformers model."""

    model: Callable[..., Any]
    bits: int | None = None
    """Bits of its matrices, where ONNX Runtime multiplies with rounded ones."""

    @property
    def measured(self) -> str:
        """What is compared."""
        return "KL divergence" if self.bits else "logit"

    def tokens(self, expected: _Expected) -> list[int]:
        """Greedy tokens after the prompt."""
        return _tokens(_run(self.model, expected.ids, expected.new_tokens, expected.end))

    def difference(self, expected: _Expected) -> float:
        """Distance from PyTorch."""
        if self.bits:
            return divergence(expected.rounded[self.bits], self.model)
        return logit_difference(expected.passes, self.model)


@dataclass(frozen=True)
class _GgufFile:
    """A GGUF file in llama.cpp."""

    run: LlamaCpp
    rounded: bool
    converted: bool
    """Whether the file's tokenizer is the model's, converted."""
    measured = "log-probability"

    def tokens(self, expected: _Expected) -> list[int]:
        """Greedy tokens after the prompt."""
        found: list[int] = []
        while len(found) < expected.new_tokens and expected.end.isdisjoint(found[-1:]):
            if not (likeliest := self.run.likeliest([*expected.ids, *found])):
                break
            found.append(max(likeliest, key=likeliest.__getitem__))
        return found

    def difference(self, expected: _Expected) -> float:
        """Largest distance from PyTorch."""
        if self.converted:
            check_tokens(self.run, expected.tokenizer, expected.prompt)
        ids, told = list(expected.ids), []
        for step in expected.passes:
            told.append(Answer(list(ids), step.logits[0, -1].log_softmax(-1)))
            ids.append(int(step.next_tokens))
        return difference(told, self.run, self.rounded)


_Files = Iterator[tuple[str, float, Callable[[], _Graph | _GgufFile]]]
"""Files of an export: name, tolerance, and the function that opens it in its runtime."""


def _onnx(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> _Files:
    if not record.has_hub_layout:
        bits = BITS.get(record.options["dtype"])
        yield "model.onnx", record.tolerance, lambda: _Graph(OnnxCausalLM.from_pretrained(directory), bits)
        return
    for dtype, allowed in {**TOLERANCES, "float32": record.tolerance}.items():
        yield file_of(dtype), allowed, partial(_hub_graph, directory / file_of(dtype), config, BITS.get(dtype))


def _hub_graph(path: Path, config: PreTrainedConfig, bits: int | None) -> _Graph:
    return _Graph(HubGraph(path, config, default_options()), bits)


def _openvino(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> _Files:
    yield GRAPH, record.tolerance, lambda: _Graph(OpenVinoCausalLM.from_pretrained(directory))


def _tensorrt(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> _Files:
    yield ENGINE, record.tolerance, lambda: _Graph(TensorRtCausalLM.from_pretrained(directory))


def _gguf(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> _Files:
    name, rounded = f"model-{record.options['dtype']}.gguf", DTYPES[record.options["dtype"]].quantised
    run = partial(LlamaCpp, directory / name, longest + 8, exact=True)
    yield name, record.tolerance, lambda: _GgufFile(run(), rounded, not record.options["tokenizer_from"])


def _padded(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> _Files:
    model = partial(load_model, str(directory), device="cpu", dtype=torch.float32)
    yield "the padded model", record.tolerance, lambda: _Graph(model()[0])


_OPENERS = {"onnx": _onnx, "tensorrt": _tensorrt, "openvino": _openvino, "gguf": _gguf, "padded": _padded}
