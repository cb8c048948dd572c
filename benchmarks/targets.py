"""A speed-up as the target: predicted beside measured, and its plan beside that of a β that was measured as fast.

Run: python benchmarks/targets.py WORK SEARCH_TEXT UNSEEN_TEXT [RUNTIME …]
(here: WikiText-2 raw, articles a beside the model's own conversations, articles b for the figures)
`vllm=PYTHON` names vLLM and the Python of its environment. Rows that exist in the directory WORK are reused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from defaults import DATA
from protocol import Chat, Rows, Unseen, write

from exporters.benchmark.meter import RuntimeMeter
from selfpruner_hub.evaluation.metrics import divergence, teach
from selfpruner_hub.models.loading import embedded_model
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.target import REQUEST, Target
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner

SPEEDUP, RUNTIMES = 1.3, ("onnx", "gguf")
SETTINGS: dict[str, Any] = {"calibration_tokens": 10_240, "shares": 1.0, "seeds": ("sensitivity",)}
"""Little text, because every β to try is a run."""
ALIKE, TRIES = 0.02, 4
"""Relative difference of two measured speed-ups, which is within the noise; number of values of β to try."""

Times = tuple[float, float]
"""Milliseconds of the dense and of the pruned model, measured in turn."""


def main(work: Path, search_text: str, unseen_text: str, runtimes: Sequence[str] = RUNTIMES) -> None:
    """Prune to the speed-up in each runtime, and by a β of the same measured one; measure both."""
    rows, pruner = Rows(work / "rows.jsonl"), AutoPruner.from_pretrained(**embedded_model())
    articles, chat = Unseen(unseen_text, pruner.tokenizer).windows[512], Chat(pruner.model, pruner.tokenizer, work)
    teacher = teach(pruner.model, articles)
    settings: dict[str, Any] = SETTINGS | {"data": DATA + search_text}

    def row(runtime: str, plan: str, pruned: PrunedModel, costs: Costs, times: Times) -> dict[str, Any]:
        return {
            "runtime": runtime,
            "plan": plan,
            "achieved_beta": round(pruned.report.achieved_beta, 4),
            "kv_groups": sum(layer.num_key_value_heads for layer in pruned.plan.layers),
            "channels": sum(layer.intermediate_size for layer in pruned.plan.layers),
            "predicted": round(costs.dense / costs.of(pruned.plan), 3),
            "measured": round(times[0] / times[1], 3),
            "milliseconds": round(times[1], 1),
            "kl_articles": round(divergence(pruned.model, articles, teacher), 4),
            **chat.figures(pruned.model),
        }

    def measure(runtime: str, python: str | None) -> None:
        meter, target = RuntimeMeter(runtime, python=python), Target("speedup", SPEEDUP, runtime)
        pruned = pruner.prune(target={"speedup": SPEEDUP}, runtime=meter, **settings)
        costs = meter.costs(pruner.model, pruner.tokenizer, target, _silent)

        def timed(each: PrunedModel) -> Times:
            return meter.measure(pruner.model, each.model, pruner.tokenizer, target, _silent)

        times = timed(pruned)
        other = alike(lambda beta: pruner.prune(beta, **settings), pruned.report.achieved_beta, times, timed)
        for plan, each in (("for the target", (pruned, times)), ("of a β", other)):  # together: of one measurement
            rows.keep(row(runtime, plan, each[0], costs, each[1]))

    for each in runtimes:
        runtime, _, python = each.partition("=")
        if not rows.have(runtime=runtime, plan="of a β"):
            measure(runtime, python or None)
        write(
            "targets",
            f"SmolLM2-135M-Instruct, `prune --target speedup={SPEEDUP:g}` with {SETTINGS} on "
            f"{DATA}{Path(search_text).name}, FFN widths in multiples of {pruner.shape.default_multiple}, for a "
            f"request of {REQUEST[0]} + {REQUEST[1]} tokens on the CPU in float32 (llama.cpp: float16, vLLM: "
            f"bfloat16); beside it the plan of a β that was measured as fast, within {100 * ALIKE:g} %, or the nearest "
            f"of {TRIES}. Times are measured beside the dense model's, in turn, for each plan anew. KL to the dense "
            f"model on 32 windows of 512 tokens of {Path(unseen_text).name}, on which nothing was chosen; {chat.words}",
            list(rows),
        )


def alike(
    prune: Callable[[float], PrunedModel], beta: float, goal: Times, timed: Callable[[PrunedModel], Times]
) -> tuple[PrunedModel, Times]:
    """Prune by a β whose plan is measured to be as fast; the nearest of some where none is."""
    tries: list[tuple[float, PrunedModel, Times]] = []
    saving = 1 - goal[1] / goal[0]
    for _ in range(TRIES):
        pruned = prune(beta)
        times = timed(pruned)
        off = (times[1] / times[0]) / (goal[1] / goal[0]) - 1
        print(f"β = {beta:.4f}: {times[0] / times[1]:.3f} for {goal[0] / goal[1]:.3f}", flush=True)
        tries.append((abs(off), pruned, times))
        if abs(off) < ALIKE:
            break
        beta = min(0.9, beta * saving / max(1 - times[1] / times[0], 0.05))  # the time saved grows like β
    return min(tries, key=lambda each: each[0])[1:]


def _silent(*_: object) -> None:
    pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:] or RUNTIMES)
