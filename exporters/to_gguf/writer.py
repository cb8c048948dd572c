"""Export to GGUF for llama.cpp, Ollama and LM Studio, with an architecture of llama.cpp that sizes every layer.

`folds` chooses the architecture, and says what becomes of the weights.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from exporters.to_gguf.dtypes import FALLBACKS, GGUF_DTYPES, HEAD, Dtype
from exporters.to_gguf.folds import Fold, fold_of
from exporters.to_gguf.importance import Importance, importance_matrix
from exporters.to_gguf.library import library, quantise
from exporters.to_gguf.llama_cpp import greedy_steps, log_probability_difference
from exporters.to_gguf.modelfile import modelfile
from exporters.to_gguf.padding import padded_state
from exporters.to_gguf.tokenizer import TokenizerFields, converted_fields, copied_fields
from exporters.writer import Written, one_of
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import architecture_of, block_rows, decoder_layers, shape_of
from selfpruner_hub.plans.plan import LayerWidths, ModelShape

INPUT_NAMES = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
"""llama.cpp's names of the input projections, in the order of `Architecture`'s row blocks."""
MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
"""Paths of a layer's norms, by llama.cpp's names."""


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: a view of a weight, converted when it is written."""

    name: str
    tensor: Tensor
    kind: GGMLQuantizationType
    importance: Tensor | None = None
    """Importance of the columns, `[columns]`."""

    def values(self, fold: Fold) -> np.ndarray:
        values = fold.apply(self.name.split(".")[-2], self.tensor).float().contiguous().numpy()
        if self.kind in _IN_PYTHON:
            return quants.quantize(values, self.kind)
        return quantise(values, self.kind, None if self.importance is None else self.importance.numpy())


_IN_PYTHON = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0)
"""Types that gguf writes without llama.cpp's library."""


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    staging: Path,
    *,
    dtype: str = "f16",
    tokenizer_from: str | None = None,
    imatrix: str | None = None,
) -> Written:
    """Write `model-DTYPE.gguf` one tensor at a time, and a `Modelfile`; compare its log-probabilities with PyTorch's.

    Args:
        model: Dense or pruned model, float32, on the CPU.
        tokenizer: Tokenizer of the model.
        staging: Directory of the file.
        dtype: Dtype of the weight matrices, a key of `GGUF_DTYPES`. Dtypes in blocks zero-pad FFN widths to multiples
            of 32, and K-quants to multiples of 256 where that takes fewer bytes.
        tokenizer_from: GGUF file (of the parent, for example) whose tokenizer is copied; None converts `tokenizer`.
        imatrix: Text, as `AutoPruner.prune` takes it, whose activations weight the errors of quantisation; None weights
            all columns alike.

    Returns:
        Report of what was written.

    Raises:
        UserError: The option is unknown, or llama.cpp does not support the model or tokenizer.
    """
    stored = GGUF_DTYPES[one_of("dtype", dtype, tuple(GGUF_DTYPES))]
    widths = _file_widths(shape_of(model.config), stored)
    fold = fold_of(model, equal=len(set(widths)) == 1)
    _check_quantisation(dtype, imatrix)
    fields = _tokenizer_fields(tokenizer, tokenizer_from, model.config.vocab_size)
    path, longest = staging / f"model-{dtype}.gguf", context_length(model.config)
    importance = importance_matrix(model, tokenizer, imatrix) if imatrix else {}
    kinds = _write_file(path, _Source(model, fold, widths, stored, importance), fields)
    (staging / "Modelfile").write_text(modelfile(path.name, model, tokenizer, longest), encoding="utf-8")
    model.config.to_json_file(staging / "config.json")  # for our benchmark's workload; llama.cpp needs none
    converted = None if tokenizer_from else tokenizer
    measurable = importlib.util.find_spec("xllamacpp") is not None

    def compare() -> Callable[[], float]:
        return partial(log_probability_difference, greedy_steps(model, longest), path, converted, stored.quantised)

    return Written(
        options={"dtype": dtype, "tokenizer_from": tokenizer_from, "imatrix": imatrix},
        libraries=("gguf", *(("xllamacpp",) if measurable else ())),
        tolerance=stored.tolerance,
        compare=compare if measurable else None,
        compared="log-probability",
        unchecked="" if measurable else "xllamacpp is not installed",
        remark=_remark(stored, kinds),
    )


def _check_quantisation(dtype: str, imatrix: str | None) -> None:
    """Refuse what cannot be quantised here, before text is read or written."""
    if GGUF_DTYPES[dtype].tensor not in _IN_PYTHON:
        library()
    elif imatrix:
        others = ", ".join(name for name, each in GGUF_DTYPES.items() if each.tensor not in _IN_PYTHON)
        raise UserError(f"An importance matrix changes nothing in {dtype}.", f"Leave it out, or choose {others}.")


def _remark(dtype: Dtype, kinds: list[GGMLQuantizationType]) -> str:
    """Say how many matrices are not stored in the dtype's blocks because their rows do not divide by 256."""
    matrices = [kind for kind in kinds if kind is not GGMLQuantizationType.F32]
    fallen = [kind for kind in matrices if kind in (*FALLBACKS.values(), GGMLQuantizationType.F16)]
    if dtype.tensor not in FALLBACKS or not fallen:
        return ""
    names = ", ".join(sorted({kind.name.lower() for kind in fallen}))
    return f"{len(fallen)} of {len(matrices)} matrices are stored as {names}: 256 does not divide their rows."


def _tokenizer_fields(
    tokenizer: PreTrainedTokenizerBase | None, source: str | None, vocabulary: int
) -> TokenizerFields:
    if source is not None:
        return copied_fields(Path(source), vocabulary)
    if tokenizer is None:
        raise UserError("A GGUF file holds the model's tokenizer, and there is none.", "Save one beside the model.")
    return converted_fields(tokenizer, vocabulary)


@dataclass(frozen=True)
class _Source:
    """Model, folds and dtypes that the tensors of a file are made from."""

    model: PreTrainedModel
    fold: Fold
    widths: list[LayerWidths]
    """Widths in the file, with padded FFNs."""
    dtype: Dtype
    importance: Importance

    def entries(self) -> Iterator[_Entry]:
        """Yield every tensor of the file, in order."""
        decoder, dtype, shape = self.model.get_decoder(), self.dtype, shape_of(self.model.config)
        embeddings, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        tied, hidden = head is embeddings, shape.hidden_size
        yield _Entry("token_embd.weight", embeddings.detach(), dtype.kind(HEAD if tied else "token_embd", hidden))  # type: ignore[operator]
        yield _Entry("output_norm.weight", decoder.norm.weight.detach(), GGMLQuantizationType.F32)
        if not tied:
            yield _Entry("output.weight", head.detach(), dtype.kind(HEAD, hidden))
        if self.fold.divides:
            yield _Entry("rope_freqs.weight", self.fold.frequency_divisors, GGMLQuantizationType.F32)
        for index, layer in enumerate(decoder_layers(self.model)):
            for part in self._parts(index, layer):
                kind, counts = GGMLQuantizationType.F32, None
                if part.tensor.ndim > 1:
                    columns = part.tensor.shape[1]
                    kind = dtype.kind(part.name, columns, index, shape.num_layers)
                    counts = self.importance.get((index, part.path))
                    if counts is not None:  # the columns that were added are zero
                        counts = nn.functional.pad(counts, (0, columns - len(counts)), value=float(counts.min()))
                yield _Entry(f"blk.{index}.{part.name}.{part.leaf}", part.tensor, kind, counts)

    def _parts(self, index: int, layer: nn.Module) -> Iterator[_Part]:
        """Yield the tensors of a decoder layer."""
        config, widths = self.model.config, self.widths[index]
        architecture, shape = architecture_of(config), shape_of(config)
        width = shape.dense.layers[index].intermediate_size
        state = padded_state(layer, config, width, widths.intermediate_size)
        modules = {**MODULES, "attn_output": architecture.attention_output, "ffn_down": architecture.ffn_output}
        for leaf in ("weight", "bias"):
            names, inputs = iter(INPUT_NAMES), []
            for path, blocks in ((p.path, p.blocks) for p in architecture.inputs):
                rows = [block_rows(shape, widths, block) for block in blocks]
                parts = state[f"{path}.{leaf}"].split(rows) if f"{path}.{leaf}" in state else ()
                for name, tensor in zip([next(names) for _ in rows], parts, strict=False):
                    inputs.append(_Part(name, leaf, path, tensor))
            if self.fold.fused and inputs:
                qkv = torch.cat([part.tensor for part in inputs[:3]])
                inputs[:3] = [_Part("attn_qkv", leaf, inputs[0].path, qkv)]
            yield from inputs
            for name, path in modules.items():
                if f"{path}.{leaf}" in state:
                    yield _Part(name, leaf, path, state[f"{path}.{leaf}"])


def _write_file(path: Path, source: _Source, fields: TokenizerFields) -> list[GGMLQuantizationType]:
    """Write the file; return the types of its tensors."""
    writer, kinds = GGUFWriter(path, source.fold.architecture), []
    _describe(writer, source)
    writer.add_file_type(source.dtype.file)
    writer.add_quantization_version(2)  # GGML_QNT_VERSION
    for key, value, kind, items in fields:
        writer.add_key_value(key, value, kind, items)
    try:
        for entry in source.entries():
            kinds.append(entry.kind)
            size = tuple(entry.tensor.shape)
            count = math.prod(quants.quant_shape_to_byte_shape(size, entry.kind))
            writer.add_tensor_info(entry.name, size, np.dtype(np.float32), count, entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in source.entries():
            writer.write_tensor_data(entry.values(source.fold))
    finally:
        writer.close()
    return kinds


def _file_widths(shape: ModelShape, dtype: Dtype) -> list[LayerWidths]:
    """Widths of every layer in the file, with padded FFNs."""
    return [
        LayerWidths(
            dtype.ffn_width(w.intermediate_size, shape.hidden_size, index, shape.num_layers), w.num_key_value_heads
        )
        for index, w in enumerate(shape.dense.layers)
    ]


def _describe(writer: GGUFWriter, source: _Source) -> None:
    """Write the keys that llama.cpp builds the model from; scalars where all layers have the same value."""
    config, shape, widths = source.model.config, shape_of(source.model.config), source.widths

    def each(values: list[int]) -> int | list[int]:
        return values[0] if len(set(widths)) == 1 else values

    writer.add_type("model")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(each([w.intermediate_size for w in widths]))
    writer.add_head_count(each([w.num_key_value_heads * shape.queries_per_group for w in widths]))
    writer.add_head_count_kv(each([w.num_key_value_heads for w in widths]))
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(source.fold.epsilon)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(shape.head_dim)


def context_length(config: PreTrainedConfig) -> int:
    """Longest context for which the file is exact, in tokens.

    llama.cpp's architectures here have no sliding window, and none of Ministral 3's larger queries at later positions.
    """
    longest = [config.max_position_embeddings]
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        longest.append(getattr(config, "sliding_window", None))
    if config.rope_parameters.get("llama_4_scaling_beta"):
        longest.append(config.rope_parameters["original_max_position_embeddings"])
    return min(length for length in longest if length)


class _Part(NamedTuple):
    """A tensor of a decoder layer: its name in llama.cpp, weight or bias, and the module that it comes from."""

    name: str
    leaf: str
    path: str
    tensor: Tensor
