"""Where the time of a default `prune` goes: seconds and floating-point operations of each stage.

Run: python benchmarks/stages.py TEXT [SETTING=VALUE …]
(here: WikiText-2 raw, articles a, beside the conversations that the model writes)
"""

from __future__ import annotations

import ast
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from protocol import write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from selfpruner_hub.models.loading import embedded_model
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.search.effort import seconds_per_token
from selfpruner_hub.settings import resolve

BETA = 0.3
SHAPES = ((4096, 576, 1536), (4096, 1536, 576))
"""Sizes of the matrix products that give the machine's rate: those of the model's FFN on 4096 tokens."""
REPEATS = 20
SHORTEST = 0.1
"""Seconds below which a stage has no row."""


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and attention, by the dtype of their first factor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._whole: set[Any] = set()  # operators that have no parts: to ask each time would slow what is timed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator; called by PyTorch."""
        packet, kwargs = func._overloadpacket, kwargs or {}
        if packet not in flop_registry and func not in self._whole:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            self._whole.add(func)
        out = func(*args, **kwargs)
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.counts[str(args[0].dtype)] += sdpa_flop_count(*(each.shape for each in args[:3]))
        elif packet in flop_registry:
            factor = next(each for each in args if isinstance(each, Tensor))
            self.counts[str(factor.dtype)] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


class Stages:
    """Progress callback that charges the time and the operations since the last call to the stage that reports."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._last, self._counted = time.perf_counter(), Counter(operations.counts)
        self.seconds: Counter[str] = Counter()
        self.operations: dict[str, Counter[str]] = {}

    def __call__(self, what: str, _done: float, _total: float, *_note: str) -> None:
        """Charge what was done since the last call to `what`."""
        now, counted = time.perf_counter(), Counter(self._operations.counts)
        if what not in self.operations:
            print(what, flush=True)
        self.seconds[what] += now - self._last
        self.operations.setdefault(what, Counter()).update(counted - self._counted)
        self._last, self._counted = now, counted


def rate(dtype: torch.dtype) -> float:
    """Operations per second of this machine's matrix products, median over sizes and repeats."""
    rates = []
    for rows, inner, columns in SHAPES:
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        rates += [2 * rows * inner * columns / _seconds(lambda a=left, b=right: nn.functional.linear(a, b))]
    return statistics.median(rates)


def _seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main(text: str, changes: dict[str, Any]) -> None:
    """Prune the real model, and say what each stage took and what the machine allows."""
    pruner = AutoPruner.from_pretrained(**embedded_model())
    token = statistics.median(seconds_per_token(pruner.model) for _ in range(3))
    with Operations() as operations:
        stages = Stages(operations)
        pruner.prune(BETA, data=f"chat+{text}", progress=stages, **changes)
    stages("the rest", 1, 1)
    rates = {str(dtype): rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    rows = []
    for what, seconds in stages.seconds.items():
        if seconds < SHORTEST:
            continue
        counted = stages.operations[what]
        allowed = sum(number / rates[dtype] for dtype, number in counted.items())
        rows.append(
            {
                "stage": what,
                "seconds": round(seconds, 1),
                "passes": round(seconds / token),
                **{f"gflop_{dtype.removeprefix('torch.')}": round(n / 1e9) for dtype, n in sorted(counted.items())},
                "share_of_machine": round(allowed / seconds, 2),
            }
        )
        print(rows[-1], flush=True)
    settings = resolve("default", **changes)
    write(
        "stages",
        f"SmolLM2-135M-Instruct in bfloat16, one default prune at β = {BETA} on conversations that it writes and "
        f"{Path(text).name}, {settings.calibration_tokens} tokens of calibration text; time between two reports of "
        "progress is charged to the stage that reports; operations are those of matrix products and attention, counted "
        "as they run; the share is the time that they would take at this machine's rate of such products, over the "
        "time that the stage took (factorisations, elementwise functions and sampling are not counted, so it is a "
        "lower bound); passes: the time in forward passes of the decoder over one token, as `--minutes` times them",
        {
            "token_ms": round(1000 * token, 3),
            "gflops": {dtype.removeprefix("torch."): round(n / 1e9) for dtype, n in rates.items()},
            "stages": rows,
        },
    )


if __name__ == "__main__":
    given = dict(each.split("=", 1) for each in sys.argv[2:])
    main(sys.argv[1], {name: ast.literal_eval(value) for name, value in given.items()})
