"""Quantisation of an ONNX graph's matrices to 8 or 4 bits, in blocks with one scale each."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporters.tracing import quiet

BLOCK = 32
"""Number of weights that share a float32 scale, along the input dimension."""
ACCURACY_LEVEL = 4
"""Accuracy level of the operator MatMulNBits: 4 rounds activations to int8 too, for the CPU's integer kernels."""


def quantize(program: Any, bits: int = 8) -> Any:
    """Quantise the weights of all matrix products, including the output head.

    Embeddings, norms and biases stay as they are; an output head that is tied to the embeddings gets its own weights.

    Args:
        program: Graph, an `onnx_ir.Model`; do not use it after this call.
        bits: Bits of a weight, 8 or 4.

    Returns:
        The quantised graph.
    """
    import onnx_ir

    _own_transposed_weights(program)
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        config = DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL, bits=bits
        )
        quantizer = MatMulNBitsQuantizer(onnx_ir.to_proto(program), algo_config=config)
        quantizer.process()
    return onnx_ir.from_proto(quantizer.model.model)


def _own_transposed_weights(program: Any) -> None:
    """Copy each transposed weight (of a tied output head) to the layout that the quantiser expects, `[in, out]`."""
    import onnx_ir

    graph = program.graph
    for node in list(graph):
        if node.op_type not in ("MatMul", "FusedMatMul") or len(node.inputs) < 2:
            continue
        weight, source = node.inputs[1], node.inputs[1].producer()
        if node.op_type == "FusedMatMul":  # made by ONNX Runtime's fusions
            if {name: attribute.value for name, attribute in node.attributes.items()} != {"transB": 1}:
                continue
        elif source is not None and source.op_type == "Transpose":
            weight = source.inputs[0]
        else:
            continue
        if weight.const_value is None or len(weight.shape) != 2:
            continue
        values = np.ascontiguousarray(weight.const_value.numpy().T)
        own = onnx_ir.Value(name=f"{weight.name}.transposed", const_value=onnx_ir.tensor(values))
        own.shape, own.dtype = onnx_ir.Shape(values.shape), weight.dtype
        graph.register_initializer(own)
        product = onnx_ir.node("MatMul", [node.inputs[0], own], name=node.name)
        output, replaced = product.outputs[0], node.outputs[0]
        output.name, output.shape, output.dtype = replaced.name, replaced.shape, replaced.dtype
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], [product], [replaced], [output])
