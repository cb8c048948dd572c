"""Export to OpenVINO."""

from typing import TypedDict

from exporters.format import DTYPE, ExportFormat, later


class OpenVinoOptions(TypedDict):
    """Recorded options of an export that are read again."""

    dtype: str


FORMAT = ExportFormat(
    "openvino",
    title="OpenVINO",
    library="openvino",
    extra="openvino",
    libraries=("openvino",),
    write=later(f"{__name__}.writer", "write"),
    options=(DTYPE,),
    recorded=OpenVinoOptions,
    files=later(f"{__name__}.runner", "files"),
    load=later(f"{__name__}.runner", "load"),
    dtypes=lambda: {"float32": (4, 4), "float16": (2, 4)},
    exported=lambda setting: {"dtype": setting.dtype},
)
