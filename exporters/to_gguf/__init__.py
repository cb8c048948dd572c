"""Export to GGUF."""

from typing import TypedDict

from exporters.format import DTYPE, ExportFormat, Option, later


class GgufOptions(TypedDict):
    """Recorded options of an export that are read again."""

    dtype: str
    tokenizer_from: str | None


FORMAT = ExportFormat(
    "gguf",
    title="llama.cpp",
    library="xllamacpp",
    extra="gguf",
    libraries=("xllamacpp",),
    write=later(f"{__name__}.writer", "write"),
    options=(
        DTYPE,
        Option("tokenizer_from", "copy the tokenizer of this GGUF file", metavar="FILE"),
        Option("imatrix", "text that tells which weights count: self, a path, …", metavar="DATA"),
    ),
    recorded=GgufOptions,
    files=later(f"{__name__}.runner", "files"),
    context=later(f"{__name__}.runner", "context"),
    load=later(f"{__name__}.runner", "load"),
    dtypes=later(f"{__name__}.runner", "dtypes"),
    exported=lambda setting: {"dtype": setting.dtype},
    batched=False,
    metered=True,
)
