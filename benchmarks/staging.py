"""Time that staged scoring of views saves, against plain scoring of a model copy per candidate on all tokens.

Run: python benchmarks/staging.py SEARCH_TEXT
(here: WikiText-2 raw, articles a)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from protocol import write
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.calibration.corpus import load_corpus
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.metrics import teach, teacher_loss
from selfpruner_hub.models.forward import Loss
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.plan import LayerWidths, Plan
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruning.prepare import fisher_information, prepared
from selfpruner_hub.pruning.slicing import slice_model
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.journal_lines import JournalLine, ScoreLine
from selfpruner_hub.search.loop import Problem, Score, search
from selfpruner_hub.search.proposers import EvolutionProposer
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.run import DEFAULT_RUN

WINDOW, CALIBRATION, FITNESS, BETA, ROUNDS, CHILDREN = 512, 16_384, 16_384, 0.3, 2, 8
FIRST_SHARE = 1 / 16
AT_ONCE = 4
"""Number of windows in one forward pass of plain scoring, which holds all of their logits."""


@torch.inference_mode()
def plain_loss(model: PreTrainedModel, windows: Tensor, loss: Loss) -> float:
    """The same KL divergence, computed simply from whole blocks of logits."""
    total, predicted = 0.0, 0
    for batch in windows.split(AT_ONCE):
        logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        total += loss(logits, predicted).item()
        predicted += len(logits)
    return total / predicted


def shared_layers(lines: list[JournalLine]) -> list[int]:
    """Largest number of first layers that each child shares with a plan scored before it."""
    plans = [line.plan.layers for line in lines if isinstance(line, ScoreLine) and line.share < 1]

    def common(a: Sequence[LayerWidths], b: Sequence[LayerWidths]) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))

    return [max(common(plan, earlier) for earlier in plans[:i]) for i, plan in enumerate(plans) if i >= CHILDREN // 2]


def main(text: str) -> None:
    """Search with both kinds of scoring, from the same seeds with as many children; compare time and result."""
    pruner = load_embedded()
    model = pruner.model
    corpus = load_corpus(text, pruner.tokenizer, tokens=CALIBRATION + FITNESS, window=WINDOW)
    calibration, fitness_text = corpus.split(CALIBRATION, FITNESS)
    fisher = fisher_information(model, calibration.windows, PruneSettings(), DEFAULT_RUN)
    budget = ParameterBudget(pruner.shape, BETA)
    results: dict[str, Any] = {}
    with prepared(model, calibration.windows, PruneSettings(), fisher) as ready:
        slicer = ready.slicer
        loss = teacher_loss(teach(model, fitness_text.windows))

        def plain(plan: Plan, _share: float) -> float:
            return plain_loss(slice_model(slicer, plan), fitness_text.windows, loss)

        fitness = Fitness(slicer, fitness_text.windows)
        starts = seeds(budget, ready.curves, fitness.loss)
        ways: dict[str, tuple[Score, float]] = {"staged": (fitness, FIRST_SHARE), "plain": (plain, 1.0)}
        for name, (score, first_share) in ways.items():
            # Equal numbers of rounds: a round costs children × share, plus one survivor on all windows if staged.
            seeds_cost = len(starts) * (1 if first_share == 1 else 1 + first_share)
            round_cost = CHILDREN if first_share == 1 else CHILDREN * first_share + 1
            settings = PruneSettings(
                evaluations=seeds_cost + ROUNDS * round_cost - 0.5,
                crossover=CHILDREN,
                mutation=CHILDREN,
                first_share=first_share,
            )
            journal, started = Journal(None, {}), time.perf_counter()
            found = search(EvolutionProposer(budget), Problem(budget, starts, score), journal, settings)
            children = found.counts["accepted"]
            scoring = sum(line.seconds for line in journal.lines if isinstance(line, ScoreLine) and line.round)
            results[name] = {
                "children": children,
                "seconds": round(time.perf_counter() - started, 1),
                "seconds_a_child": round(scoring / children, 3),
                "final_kl": round(fitness(found.best.plan), 4),
                "full_evaluation_equivalents": found.spent,
            }
            print(name, results[name], flush=True)
            if name == "staged":
                shared = sorted(shared_layers(journal.lines))
                results["first_layers_shared_with_an_earlier_plan"] = {
                    "median": shared[len(shared) // 2],
                    "mean": round(sum(shared) / len(shared), 2),
                    "of": pruner.shape.num_layers,
                }
    results["times_cheaper"] = round(results["plain"]["seconds_a_child"] / results["staged"]["seconds_a_child"], 2)
    print(results)
    write(
        "staging",
        f"SmolLM2-135M-Instruct, {str(model.dtype)}, β = {BETA}; {CALIBRATION} calibration and {FITNESS} fitness "
        f"tokens of {Path(text).name}; {ROUNDS} rounds of {CHILDREN} children of the evolution from the same seeds. "
        "plain: a compact copy per candidate, whole blocks of logits, all tokens; staged: views, logits in chunks, "
        f"1/{1 / FIRST_SHARE:g} of the tokens for all, and all of them for the best of each round",
        results,
    )


if __name__ == "__main__":
    main(sys.argv[1])
