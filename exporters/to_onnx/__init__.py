"""Export to ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

from exporters.format import DTYPE, ExportFormat, Option, later

if TYPE_CHECKING:
    from exporters.runtime import Setting


class RecordedHub(TypedDict):
    """Recorded options of an export with the layout `hub` that are read again."""

    layout: Literal["hub"]


class OnnxOptions(TypedDict):
    """Recorded options of an export with another layout that are read again."""

    dtype: str
    fusions: Literal["cpu", "cuda", "none"]


def export_options(setting: Setting) -> dict[str, Any]:
    """Options of an export that is made for a benchmark; see `Format.exported`."""
    return {"dtype": setting.dtype, "fusions": "cuda" if setting.device.startswith("cuda") else "cpu"}


FORMAT = ExportFormat(
    "onnx",
    title="ONNX Runtime",
    library="onnxruntime",
    extra="onnx",
    libraries=("onnxruntime",),
    write=later(f"{__name__}.writer", "write"),
    options=(
        DTYPE,
        Option("fusions", "operators of cpu, cuda, or none for a plain graph"),
        Option("layout", "transformers, or hub for ONNX Runtime GenAI and Transformers.js"),
    ),
    recorded=RecordedHub | OnnxOptions,
    published={"layout": "hub"},
    files=later(f"{__name__}.runner", "files"),
    load=later(f"{__name__}.runner", "load"),
    # int8 has a float32 scale for each block of 32 weights.
    dtypes=lambda: {"float32": (4, 4), "float16": (2, 2), "int8": (36 / 32, 4)},
    exported=export_options,
    on_gpu=True,
    metered=True,
)
