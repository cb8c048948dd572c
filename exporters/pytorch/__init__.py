"""Models in PyTorch, by transformers."""

from exporters.format import Format, later

FORMAT = Format(
    "torch",
    title="PyTorch",
    library="torch",
    load=later(f"{__name__}.runner", "load"),
    dtypes=lambda: {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2)},
    on_gpu=True,
    metered=True,
)
