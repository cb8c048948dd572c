"""Export to OpenVINO IR: a decode graph with the KV cache as internal state, as OpenVINO's own runtimes expect it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters.parity import Step, expected, logit_difference
from exporters.to_openvino.causal_lm import OPENVINO_EXTRA, OpenVinoCausalLM
from exporters.tracing import decode_step, tracing
from exporters.writer import Written, one_line, one_of, require
from selfpruner_hub.errors import ExportError

OPENVINO_TOLERANCES = {"float32": 1e-3, "float16": 0.2}
"""Largest allowed distance of a logit from PyTorch's in float32, by dtype of the weights; arithmetic is float32."""


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, staging: Path, *, dtype: str = "float32"
) -> Written:
    """Write `openvino_model.xml` and `.bin` and the configuration; compare its logits with PyTorch's.

    Args:
        model: Dense or pruned model, float32, on the CPU.
        tokenizer: Unused.
        staging: Directory of the files.
        dtype: Dtype of the weights, `"float32"` or `"float16"`.

    Returns:
        Report of what was written.

    Raises:
        UserError: The option is unknown, or OpenVINO is not installed.
        ExportError: The model cannot be traced.
    """
    one_of("dtype", dtype, tuple(OPENVINO_TOLERANCES))
    require("openvino", OPENVINO_EXTRA)
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    inputs, shapes = decode_step(model)
    for values in (inputs, shapes):
        values.pop("logits_to_keep")  # not an input that OpenVINO's runtimes know
    config = OpenVINOConfig(dynamic=True, dynamic_shapes=shapes, compress_to_fp16=dtype == "float16")
    try:
        with tracing(model):
            exported = OpenVINOExporter().export(model, inputs, config)
            exported.generation_config = model.generation_config
            exported.save_pretrained(staging)
    except Exception as error:  # torch.export, OpenVINO and the exporter share no base class
        raise ExportError(f"{type(model).__name__} cannot be traced to OpenVINO: {one_line(error)}") from error
    del exported
    return Written(
        options={"dtype": dtype},
        libraries=("openvino",),
        tolerance=OPENVINO_TOLERANCES[dtype],
        compare=lambda: partial(_difference, expected(model), staging),
    )


def _difference(passes: list[Step], directory: Path) -> float:
    return logit_difference(passes, OpenVinoCausalLM.open(directory))
