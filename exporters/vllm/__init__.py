"""Models in vLLM, which pins another transformers and so runs in an environment of its own."""

from pathlib import Path

from exporters.format import Format, OtherPython, later

FORMAT = Format(
    "vllm",
    title="vLLM",
    dtypes=lambda: {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2)},
    on_gpu=True,
    batches=(1, 8, 32),
    scored=False,
    metered=True,
    elsewhere=OtherPython(
        program=Path(__file__).with_name("runner.py"),
        versions=later(f"{__name__}.other_python", "versions"),
        staged=later(f"{__name__}.other_python", "staged"),
    ),
)
