"""Export to GGUF for llama.cpp, Ollama and LM Studio, with llama.cpp's architecture `deci` (different layer widths).

Models whose layers all have the same widths (dense parents) get `llama`, which every llama.cpp program supports.
Both architectures rotate neighbouring dimensions; transformers rotates halves. So the rows of q and k are permuted.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from exporters.padding import padded_state
from exporters.to_gguf.llama_cpp import answers, log_probability_difference
from exporters.to_gguf.tokenizer import TokenizerFields, converted_fields, copied_fields
from exporters.writer import Written, one_of
from selfpruner_hub.errors import UnsupportedArchitectureError, UserError
from selfpruner_hub.models.architectures import architecture_of, block_rows, decoder_layers, shape_of
from selfpruner_hub.plans.plan import LayerWidths, ModelShape


@dataclass(frozen=True)
class Dtype:
    """Storage of the weight matrices; norms and biases are always float32."""

    tensor: GGMLQuantizationType
    file: LlamaFileType
    multiple: int
    """Divisor of the row lengths: FFN widths are zero-padded to multiples of it."""
    tolerance: float
    """Largest allowed distance of a log-probability from PyTorch's in float32, for each step's 64 likeliest tokens.

    The largest distances on SmolLM2, dense and at β = 0.3 and 0.5, were 2.6e-4, 0.022 and 2.1. The last belongs to an
    unlikely token, which adds almost nothing to the KL divergence (0.002 nats in total at β = 0.3); llama.cpp also
    rounds the activations to 8 bits.
    """


DTYPES = {
    "f32": Dtype(GGMLQuantizationType.F32, LlamaFileType.ALL_F32, 1, 1e-3),
    "f16": Dtype(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, 1, 0.1),
    "q8_0": Dtype(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, 32, 4.0),
}
WRITABLE = ("llama", "mistral", "qwen2", "phi3")
"""Architectures that `deci` can express. It has no q/k norms (Qwen3) and not Gemma's activation."""
ROPE_TYPES = ("default", "linear", "llama3")
"""RoPE types whose frequencies are the default ones divided by constants."""
INPUT_NAMES = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
"""llama.cpp's names of the input projections, in the order of `Architecture`'s row blocks."""


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: a view of a weight, converted when it is written."""

    name: str
    tensor: Tensor
    rotated_heads: int = 0
    """Number of heads within which the rows are permuted; 0 permutes nothing."""

    def stored_as(self, dtype: Dtype) -> GGMLQuantizationType:
        if self.tensor.ndim == 1:
            return GGMLQuantizationType.F32
        return dtype.tensor if self.tensor.shape[1] % dtype.multiple == 0 else GGMLQuantizationType.F16

    def values(self, dtype: Dtype) -> np.ndarray:
        tensor = self.tensor
        if self.rotated_heads:
            tensor = tensor.unflatten(0, (self.rotated_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return quants.quantize(tensor.float().contiguous().numpy(), self.stored_as(dtype))


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    staging: Path,
    *,
    dtype: str = "f16",
    tokenizer_from: str | None = None,
) -> Written:
    """Write `model-DTYPE.gguf`, one tensor at a time, and compare its log-probabilities with PyTorch's.

    Args:
        model: Dense or pruned model, float32, on the CPU.
        tokenizer: Tokenizer of the model.
        staging: Directory of the file.
        dtype: Dtype of the weight matrices: `"f32"`, `"f16"`, or `"q8_0"` (zero-pads FFN widths to multiples of 32).
        tokenizer_from: GGUF file (of the parent, for example) whose tokenizer is copied; None converts `tokenizer`.

    Returns:
        Report of what was written.

    Raises:
        UserError: The option is unknown, or llama.cpp does not support the model or tokenizer.
    """
    stored = DTYPES[one_of("dtype", dtype, tuple(DTYPES))]
    _check(model.config, model.get_decoder().rotary_emb)
    fields = _tokenizer_fields(tokenizer, tokenizer_from, model.config.vocab_size)
    path = staging / f"model-{dtype}.gguf"
    _write_file(path, model, fields, stored)
    model.config.to_json_file(staging / "config.json")  # for our benchmark's workload; llama.cpp needs none
    longest, converted = _context_length(model.config), None if tokenizer_from else tokenizer
    measurable = importlib.util.find_spec("xllamacpp") is not None
    return Written(
        options={"dtype": dtype, "tokenizer_from": tokenizer_from},
        libraries=("gguf", *(("xllamacpp",) if measurable else ())),
        tolerance=stored.tolerance,
        measure=partial(log_probability_difference, answers(model, longest), path, converted) if measurable else None,
        unchecked="" if measurable else "xllamacpp is not installed",
    )


def _check(config: PreTrainedConfig, rotary: nn.Module) -> None:
    """Refuse models that `deci` would silently compute differently."""
    model_type = architecture_of(config).model_type
    if model_type not in WRITABLE:
        raise UnsupportedArchitectureError(
            f"llama.cpp has no architecture for pruned {model_type} models.",
            f"GGUF can be written for {', '.join(WRITABLE)}; export to onnx, or to padded.",
        )
    if config.hidden_act != "silu":
        raise UnsupportedArchitectureError(
            f"llama.cpp computes silu in such models, not {config.hidden_act}.", "Export to onnx, or to padded."
        )
    rope, whole = config.rope_parameters, 2 * len(rotary.inv_freq) == shape_of(config).head_dim  # type: ignore[arg-type]
    if rope["rope_type"] not in ROPE_TYPES or not whole:
        kind = rope["rope_type"] if whole else "partial"
        raise UnsupportedArchitectureError(
            f"A GGUF file cannot hold {kind} rotary embeddings here.",
            f"It can for {', '.join(ROPE_TYPES)}; export to onnx, or to padded.",
        )


def _tokenizer_fields(
    tokenizer: PreTrainedTokenizerBase | None, source: str | None, vocabulary: int
) -> TokenizerFields:
    if source is not None:
        return copied_fields(Path(source), vocabulary)
    if tokenizer is None:
        raise UserError("A GGUF file holds the model's tokenizer, and there is none.", "Save one beside the model.")
    return converted_fields(tokenizer, vocabulary)


def _write_file(path: Path, model: PreTrainedModel, fields: TokenizerFields, dtype: Dtype) -> None:
    config, shape = model.config, shape_of(model.config)
    # Widths in the file, with padded FFNs.
    widths = [
        LayerWidths(-(-w.intermediate_size // dtype.multiple) * dtype.multiple, w.num_key_value_heads)
        for w in shape.dense.layers
    ]
    writer = GGUFWriter(path, "llama" if len(set(widths)) == 1 else "deci")
    _describe(writer, config, shape, widths)
    writer.add_file_type(dtype.file)
    writer.add_quantization_version(2)  # GGML_QNT_VERSION
    for key, value, kind, items in fields:
        writer.add_key_value(key, value, kind, items)
    try:
        for entry in _entries(model, shape, widths):
            stored, size = entry.stored_as(dtype), tuple(entry.tensor.shape)
            count = math.prod(quants.quant_shape_to_byte_shape(size, stored))
            writer.add_tensor_info(entry.name, size, np.dtype(np.float32), count, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in _entries(model, shape, widths):
            writer.write_tensor_data(entry.values(dtype))
    finally:
        writer.close()


def _describe(writer: GGUFWriter, config: PreTrainedConfig, shape: ModelShape, widths: list[LayerWidths]) -> None:
    """Write the keys that llama.cpp builds the model from; scalars where all layers have the same value."""

    def each(values: list[int]) -> int | list[int]:
        return values[0] if writer.arch == "llama" else values

    writer.add_type("model")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(each([w.intermediate_size for w in widths]))
    writer.add_head_count(each([w.num_key_value_heads * shape.queries_per_group for w in widths]))
    writer.add_head_count_kv(each([w.num_key_value_heads for w in widths]))
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(shape.head_dim)


def _context_length(config: PreTrainedConfig) -> int:
    """Longest context for which the file is exact, in tokens: `deci` and `llama` have no sliding window."""
    longest: int = config.max_position_embeddings
    return min(getattr(config, "sliding_window", None) or longest, longest)


def _entries(model: PreTrainedModel, shape: ModelShape, widths: list[LayerWidths]) -> Iterator[_Entry]:
    """Yield every tensor of the file, in order."""
    decoder, config = model.get_decoder(), model.config
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    yield _Entry("token_embd.weight", embeddings.detach())  # type: ignore[operator]
    yield _Entry("output_norm.weight", decoder.norm.weight.detach())
    if head is not embeddings:
        yield _Entry("output.weight", head.detach())
    factors = _rope_factors(decoder.rotary_emb, config.rope_parameters["rope_theta"])
    if not torch.allclose(factors, torch.ones_like(factors)):
        yield _Entry("rope_freqs.weight", factors)
    for index, (layer, own, padded) in enumerate(zip(decoder_layers(model), shape.dense.layers, widths, strict=True)):
        for entry in _layer_entries(padded_state(layer, config, own, padded), config, padded):
            yield replace(entry, name=f"blk.{index}.{entry.name}")


def _layer_entries(state: dict[str, Tensor], config: PreTrainedConfig, widths: LayerWidths) -> Iterator[_Entry]:
    """Yield the tensors of a decoder layer, by their names within the layer."""
    architecture, shape = architecture_of(config), shape_of(config)
    modules = {
        "attn_output": architecture.attention_output,
        "ffn_down": architecture.ffn_output,
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for leaf in ("weight", "bias"):
        names = iter(INPUT_NAMES)
        for projection in architecture.inputs:
            rows = [block_rows(shape, widths, block) for block in projection.blocks]
            parts = state[f"{projection.path}.{leaf}"].split(rows) if f"{projection.path}.{leaf}" in state else ()
            for name, part in zip([next(names) for _ in rows], parts, strict=False):
                heads = len(part) // shape.head_dim if name in ("attn_q", "attn_k") else 0
                yield _Entry(f"{name}.{leaf}", part, heads)
        for name, path in modules.items():
            if f"{path}.{leaf}" in state:
                yield _Entry(f"{name}.{leaf}", state[f"{path}.{leaf}"])


def _rope_factors(rotary: nn.Module, theta: float) -> Tensor:
    """Divisors of the default rotary frequencies, `[head_dim / 2]`."""
    frequencies: Tensor = rotary.inv_freq  # type: ignore[assignment]
    plain = theta ** -(torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies))
    return (plain / frequencies.double()).float()
