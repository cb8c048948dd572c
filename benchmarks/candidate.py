"""Time of a candidate in addition to its forward pass, and peak memory of a search on SmolLM2-135M-Instruct.

Run: python benchmarks/candidate.py
"""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np
import torch
from protocol import write

from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.metrics import divergence, teach
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.pruning.prepare import prepared
from selfpruner_hub.search.proposers import random_rates
from selfpruner_hub.settings import PruneSettings

TOKENS, WINDOW, PLANS, BETA = 16_384, 512, 7, 0.3


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Time the preparation and scoring of random plans, first with new repairs, then with memoised ones."""
    imported = peak_mb()
    pruner = load_embedded()
    model = pruner.model
    # A complete prune first, for its peak memory: the model proposes, with repairs and the whole fitness text.
    settings = {"data": "self", "window": WINDOW, "calibration_tokens": TOKENS // 2, "fitness_tokens": TOKENS // 2}
    pruner.prune(BETA, proposer="self", evaluations=6, progress=False, **settings)
    peak = peak_mb()
    windows = torch.randint(model.config.vocab_size, (TOKENS // WINDOW, WINDOW))  # time does not depend on the text
    budget = ParameterBudget(pruner.shape, BETA)
    rng = np.random.default_rng(0)
    rows = []
    with prepared(model, windows, PruneSettings()) as ready:
        slicer = ready.slicer
        teacher = teach(model, windows)
        for plan in [budget.project(random_rates(budget, rng)) for _ in range(PLANS)]:
            start = time.perf_counter()
            layers = slicer.layers(plan)
            cold = time.perf_counter() - start
            start = time.perf_counter()
            slicer.layers(plan)
            warm = time.perf_counter() - start
            with with_layers(model, layers):
                start = time.perf_counter()
                divergence(model, windows, teacher)
                forward = time.perf_counter() - start
            rows.append((cold, warm, forward))
    cold, warm, forward = (statistics.median(column) for column in zip(*rows, strict=True))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    results = {
        "prepare_s": round(cold, 4),
        "prepare_memoised_s": round(warm, 4),
        "forward_s": round(forward, 3),
        "prepare_over_forward": round(cold / forward, 4),
        "weights_mb": round(weights),
        "peak_memory_mb": round(peak),
        "libraries_before_loading_mb": round(imported),
        "memory_bound_mb": round(2.5 * weights + 1500),
    }
    write(
        "candidate",
        f"SmolLM2-135M-Instruct, {str(model.dtype)}, β = {BETA}: median over {PLANS} random plans of preparing a "
        f"candidate (repairs included, none memoised) and of its KL on {TOKENS} tokens in windows of {WINDOW}; "
        "peak memory is that of the process up to the end of a whole prune(proposer='self') before that",
        results,
    )
    for key, value in results.items():
        print(f"{key:30} {value}")


if __name__ == "__main__":
    main()
