"""Export to a zero-padded model of the stock architecture."""

from typing import TypedDict

from exporters.format import DTYPE, Format, Option, later


class PaddedOptions(TypedDict):
    """Recorded options of an export that are read again."""

    dtype: str


FORMAT = Format(
    "padded",
    title="stock transformers",
    write=later(f"{__name__}.writer", "write"),
    options=(Option("width", "widest or dense"), DTYPE),
    recorded=PaddedOptions,
    files=later(f"{__name__}.runner", "files"),
)
