"""Dtypes of a GGUF file: how each tensor is stored, with the rules of llama.cpp's `llama-quantize`."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

Kind = GGMLQuantizationType
GGUF_BLOCK = 32
"""Row lengths of quantised matrices are multiples of it: FFN widths are zero-padded to reach one."""
FALLBACKS = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""Types with blocks of 32 for rows that the 256 values of a K-quant's block do not divide."""
HEAD = "output"
"""Name of the output head; tied embeddings are stored as the head is."""


@dataclass(frozen=True)
class Dtype:
    """Storage of the weight matrices; norms and biases are always float32."""

    tensor: Kind
    file: LlamaFileType
    tolerance: float
    """Largest allowed distance of a log-probability from PyTorch's in float32; at least twice the largest that was
    measured on SmolLM2, dense and pruned. `llama_cpp.log_probability_difference` has the tokens that are compared."""
    head: Kind | None = None
    """Type of the output head; None stores it as the other matrices."""
    finer: Kind | None = None
    """Type of attn_v and ffn_down in the layers where errors count most; None stores them as the other matrices."""
    fused: Kind | None = None
    """Type of q, k and v in one matrix; None stores it as the other matrices."""

    @property
    def quantised(self) -> bool:
        """Whether matrices are stored in blocks."""
        return GGML_QUANT_SIZES[self.tensor][0] > 1

    def kind(self, name: str, columns: int, layer: int = 0, layers: int = 0) -> Kind:
        """Choose the type of a matrix.

        Args:
            name: Name of the matrix in llama.cpp, without its layer and `.weight`.
            columns: Length of a row.
            layer: Index of the layer.
            layers: Number of layers.

        Returns:
            The type of this dtype, or its fallback, or float16 if the blocks of neither divide a row.
        """
        preferred = self.tensor
        if name == HEAD:
            preferred = self.head or preferred
        elif name in ("attn_v", "ffn_down") and _counts_most(layer, layers):
            preferred = self.finer or preferred
        elif name == "attn_qkv":
            preferred = self.fused or preferred
        kinds = (preferred, FALLBACKS.get(preferred, Kind.F16), Kind.F16)
        return next(kind for kind in kinds if columns % GGML_QUANT_SIZES[kind][0] == 0)

    def ffn_width(self, width: int, hidden: int, layer: int, layers: int) -> int:
        """Choose the FFN width of a layer in the file.

        Args:
            width: Width of the layer.
            hidden: Hidden size of the model.
            layer: Index of the layer.
            layers: Number of layers.

        Returns:
            The width itself for floats. For blocks the next multiple of 32, or of the K-quants' 256 if the zeros take
            fewer bytes than the fallback of rows that 256 does not divide.
        """
        if not self.quantised:
            return width

        def size(padded: int) -> float:
            inputs = 2 * padded * _bytes(self.kind("ffn_up", hidden, layer, layers), hidden)
            return inputs + hidden * _bytes(self.kind("ffn_down", padded, layer, layers), padded)

        multiples = {GGUF_BLOCK, GGML_QUANT_SIZES[self.tensor][0]}
        return min((-(-width // multiple) * multiple for multiple in sorted(multiples)), key=size)


def _counts_most(layer: int, layers: int) -> bool:
    """Whether a layer is among the first or last eighth, or every third between: `use_more_bits` in llama.cpp."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _bytes(kind: Kind, columns: int) -> float:
    block, size = GGML_QUANT_SIZES[kind]
    return columns / block * size


GGUF_DTYPES = {
    "f32": Dtype(Kind.F32, LlamaFileType.ALL_F32, 1e-3),
    "f16": Dtype(Kind.F16, LlamaFileType.MOSTLY_F16, 0.1),
    "q8_0": Dtype(Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0, 1.5),
    "q6_k": Dtype(Kind.Q6_K, LlamaFileType.MOSTLY_Q6_K, 1.5),
    "q5_k_m": Dtype(Kind.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, 4.0, Kind.Q6_K, Kind.Q6_K, Kind.Q6_K),
    "q4_k_m": Dtype(Kind.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, 4.0, Kind.Q6_K, Kind.Q6_K, Kind.Q5_K),
    "q4_0": Dtype(Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0, 6.0, Kind.Q6_K),
}
