"""A speed-up as the target: predicted beside measured, and its plan beside that of a β of the same cost.

Run: python benchmarks/targets.py WORK SEARCH_TEXT UNSEEN_TEXT [RUNTIME …]
(here: WikiText-2 raw, articles a beside the model's own conversations, articles b for the figures)
Rows that exist in the directory WORK are reused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defaults import DATA
from protocol import Chat, Rows, Unseen, write

from exporters.benchmark.meter import RuntimeMeter
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.metrics import divergence, teach
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.target import Target
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner

SPEEDUP, RUNTIMES, PRESET = 1.3, ("onnx", "gguf"), "fast"
ALIKE, TRIES = 0.005, 4
"""Largest relative difference of the predicted times of two plans that are compared; number of values of β to try."""


def main(work: Path, search_text: str, unseen_text: str, runtimes: Sequence[str] = RUNTIMES) -> None:
    """Prune to the speed-up in each runtime, and by a β of the same predicted time; measure both."""
    rows, pruner = Rows(work / "rows.jsonl"), load_embedded()
    articles, chat = Unseen(unseen_text, pruner.tokenizer).windows[512], Chat(pruner.model, pruner.tokenizer, work)
    teacher = teach(pruner.model, articles)
    asked: dict[str, Any] = {"preset": PRESET, "data": DATA + search_text}

    def row(runtime: str, plan: str, made: PrunedModel, costs: Costs, dense: float, own: float) -> dict[str, Any]:
        return {
            "runtime": runtime,
            "plan": plan,
            "achieved_beta": round(made.report.achieved_beta, 4),
            "kv_groups": sum(layer.num_key_value_heads for layer in made.plan.layers),
            "channels": sum(layer.intermediate_size for layer in made.plan.layers),
            "predicted": round(costs.dense / costs.of(made.plan), 3),
            "measured": round(dense / own, 3),
            "milliseconds": round(own, 1),
            "kl_articles": round(divergence(made.model, articles, teacher), 4),
            **chat.figures(made.model),
        }

    for runtime in runtimes:
        if rows.have(runtime=runtime, plan="of a β"):
            continue
        meter, target = RuntimeMeter(runtime), Target("speedup", SPEEDUP, runtime)
        made = pruner.prune(target={"speedup": SPEEDUP}, runtime=meter, **asked)
        costs = meter.costs(pruner.model, pruner.tokenizer, target, _silent)
        for plan, each in (("for the target", made), ("of a β", alike(pruner, made, costs, asked))):
            times = meter.measure(pruner.model, each.model, pruner.tokenizer, target, _silent)
            rows.keep(row(runtime, plan, each, costs, *times))
        write(
            "targets",
            f"SmolLM2-135M-Instruct, `prune --target speedup={SPEEDUP:g} --preset {PRESET}` on "
            f"{DATA}{Path(search_text).name}, for a request of {target.prompt} + {target.new_tokens} tokens on the CPU "
            "in float32 (llama.cpp: float16); beside it the plan of the β whose predicted time is the same within "
            f"{100 * ALIKE:g} %. Times are measured beside the dense model's, in turn, for each plan anew. KL to the "
            f"dense model on 32 windows of 512 tokens of {Path(unseen_text).name}, on which nothing was chosen; "
            f"{chat.words}",
            list(rows),
        )


def alike(pruner: AutoPruner, made: PrunedModel, costs: Costs, asked: dict[str, Any]) -> PrunedModel:
    """Prune by a β whose plan costs the same as that of `made`."""
    beta, wanted = made.report.achieved_beta, costs.of(made.plan)
    for _ in range(TRIES):
        other = pruner.prune(beta, **asked)
        cost = costs.of(other.plan)
        print(f"β = {beta:.4f}: {costs.dense / cost:.3f} for {costs.dense / wanted:.3f}", flush=True)
        if abs(cost / wanted - 1) < ALIKE:
            return other
        beta *= (costs.dense - wanted) / (costs.dense - cost)
    sys.exit(f"No β in {TRIES} tries costs what the target does.")


def _silent(*_: object) -> None:
    pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:] or RUNTIMES)
