"""int8 weights of an ONNX graph: matrix products read their weights in blocks, each with its own scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporters.tracing import quiet

BLOCK = 32
"""Weights that share a scale, along the input of a product; 1 float32 scale for 32 bytes."""
ACCURACY_LEVEL = 4
"""Of the operator MatMulNBits: activations are rounded to int8 too, for the integer kernels of the CPU."""


def quantize(program: Any) -> Any:
    """Quantise the weights of all matrix products, the language-model head's among them.

    Embeddings, norms and biases stay as they are; a head that is tied to the embeddings gets weights of its own.

    Args:
        program: The graph, an `onnx_ir.Model`; it is not used any more afterwards.

    Returns:
        The quantised graph.
    """
    import onnx_ir

    _own_transposed_weights(program)
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        config = DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL, bits=8
        )
        quantizer = MatMulNBitsQuantizer(onnx_ir.to_proto(program), algo_config=config)
        quantizer.process()
    return onnx_ir.from_proto(quantizer.model.model)


def _own_transposed_weights(program: Any) -> None:
    """Give each product with a transposed weight (a tied head's) a weight as the quantiser expects it: `[in, out]`."""
    import onnx_ir

    graph = program.graph
    for node in list(graph):
        if node.op_type not in ("MatMul", "FusedMatMul") or len(node.inputs) < 2:
            continue
        weight, source = node.inputs[1], node.inputs[1].producer()
        if node.op_type == "FusedMatMul":  # of ONNX Runtime's fusions
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
