"""Export to TensorRT."""

from typing import Literal, TypedDict

from exporters.format import DTYPE, ExportFormat, Option, later
from selfpruner_hub.storage.versioned_json import Count


class TensorRTOptions(TypedDict):
    """Recorded options of an export that are read again."""

    dtype: Literal["float32", "float16", "bfloat16"]
    context: Count
    library: str
    compute_capability: str
    sha256: str


FORMAT = ExportFormat(
    "tensorrt",
    title="TensorRT",
    libraries=("tensorrt",),
    write=later(f"{__name__}.writer", "write"),
    options=(
        DTYPE,
        Option("compute_capability", "of a GPU that is not here, such as 8.6", metavar="C"),
        Option("batch", "most sequences at a time", int, "N"),
        Option("context", "most tokens of a sequence", int, "N"),
    ),
    recorded=TensorRTOptions,
    files=later(f"{__name__}.runner", "files"),
    check=later(f"{__name__}.causal_lm", "check_fits"),
    context=lambda record, config: record.options["context"],
    load=later(f"{__name__}.runner", "load"),
    dtypes=lambda: {"float16": (2, 2), "float32": (4, 4), "bfloat16": (2, 2)},
    exported=lambda setting: {"dtype": setting.dtype, "batch": setting.batch, "context": setting.longest},
    device="cuda",
)
