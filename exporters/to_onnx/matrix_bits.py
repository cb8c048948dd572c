"""Quantisation of an ONNX graph's matrices to 8 or 4 bits, in blocks with one scale each."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from exporters.tracing import quiet

ONNX_BLOCK = 32
"""Number of weights that share a float32 scale, along the input dimension."""
HEAD_BITS = 8
"""Bits of the output head, in 4-bit graphs too: its rounding errors reach every logit undamped."""
ACCURACY_LEVEL = 4
"""Accuracy level of the operator MatMulNBits: 4 rounds activations to int8 too, for the CPU's integer kernels."""


def quantize(program: Any, bits: int = 8) -> Any:
    """Quantise the weights of all matrix products, including the output head.

    Embeddings, norms and biases stay as they are; an output head that is tied to the embeddings gets its own weights.

    Args:
        program: Graph, an `onnx_ir.Model`; do not use it after this call.
        bits: Bits of a weight, 8 or 4; the output head has `HEAD_BITS`.

    Returns:
        The quantised graph.
    """
    import onnx_ir

    _own_transposed_weights(program)
    proto = onnx_ir.to_proto(program)
    products = [node.name for node in proto.graph.node if node.op_type == "MatMul"]
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        for width, others in ((HEAD_BITS, products[:-1]), (bits, [])):  # the head is the last product
            config = DefaultWeightOnlyQuantConfig(
                block_size=ONNX_BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL, bits=width
            )
            quantizer = MatMulNBitsQuantizer(proto, algo_config=config, nodes_to_exclude=others)
            quantizer.process()
            proto = quantizer.model.model
    return onnx_ir.from_proto(proto)


def rounded(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Copy a model, with its matrices rounded as `quantize` rounds them: what the quantised graph computes, in PyTorch.

    Args:
        model: Model in float32 on the CPU.
        bits: Bits of a weight, 8 or 4; the output head has `HEAD_BITS`.

    Returns:
        The copy. An output head that is tied to the embeddings has weights of its own.
    """
    copied = copy.deepcopy(model)
    head = copied.get_output_embeddings()
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            weight = _rounded(module.weight.data, HEAD_BITS if module is head else bits)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return copied


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """Round a weight `[out, in]` in blocks; a block's weight of the largest size becomes the least integer, exactly."""
    blocks = functional.pad(weight, (0, -weight.shape[1] % ONNX_BLOCK)).unflatten(1, (-1, ONNX_BLOCK))
    least = -(2 ** (bits - 1))
    scale = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / least
    integers = torch.where(scale == 0, 0, blocks / scale).round().clamp(least, -least - 1)
    return (integers * scale).flatten(1)[:, : weight.shape[1]].contiguous()


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
        transposed = onnx_ir.Value(name=f"{weight.name}.transposed", const_value=onnx_ir.tensor(values))
        transposed.shape, transposed.dtype = onnx_ir.Shape(values.shape), weight.dtype
        graph.register_initializer(transposed)
        product = onnx_ir.node("MatMul", [node.inputs[0], transposed], name=node.name)
        output, replaced = product.outputs[0], node.outputs[0]
        output.name, output.shape, output.dtype = replaced.name, replaced.shape, replaced.dtype
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], [product], [replaced], [output])
