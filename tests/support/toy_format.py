"""A whole format in ten lines: PyTorch's files in a folder `toy`."""

from functools import partial

from exporters.format import ExportFormat, Option
from exporters.opened import File, Graph
from exporters.parity import expected, logit_difference
from exporters.runtime import CausalLMRunner
from exporters.writer import Written
from selfpruner_hub.models.loading import load_model


def opened(directory):
    return load_model(f"{directory}/toy", device="cpu")[0]


def write(model, tokenizer, staging, *, bricks=1):
    model.save_pretrained(staging / "toy")
    passes = expected(model)
    return Written({"bricks": bricks}, (), 1e-4, lambda: partial(compare, passes, staging))


def compare(passes, directory):
    return logit_difference(passes, opened(directory))


FORMAT = ExportFormat(
    "toy",
    title="Toy",
    write=write,
    options=(Option("bricks", "how many", int, "N"),),
    files=lambda directory, record, *_: [File("toy", record.tolerance, lambda: Graph(opened(directory)))],
    load=lambda name, _: CausalLMRunner(opened(name)),
    dtypes=lambda: {"float32": (4, 4)},
    exported=lambda _: {},
)
