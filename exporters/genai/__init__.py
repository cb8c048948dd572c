"""Exports to ONNX with the layout `hub` in ONNX Runtime GenAI."""

from exporters.format import Format, later

FORMAT = Format(
    "genai",
    title="ONNX Runtime GenAI",
    libraries=("onnxruntime-genai",),
    load=later(f"{__name__}.runner", "GenaiRunner"),
    # int8 and int4 have a float32 scale for each block of 32 weights.
    dtypes=lambda: {"float32": (4, 4), "float16": (2, 2), "int8": (36 / 32, 4), "int4": (20 / 32, 4)},
    exported=lambda setting: {"layout": "hub"},
    export_format="onnx",
    scored=False,
)
