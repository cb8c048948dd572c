"""How much faster a pruned SmolLM2-135M-Instruct is in PyTorch on this CPU, beside the ratio of the parameters.

Run: python benchmarks/latency.py
"""

from __future__ import annotations

from protocol import write

from exporters.latency import prefill_and_decode
from selfpruner_hub.budget import Budget
from selfpruner_hub.calibration import calibrate
from selfpruner_hub.corpus import sample_windows
from selfpruner_hub.demo import load_embedded
from selfpruner_hub.importance import rank
from selfpruner_hub.provenance import count_parameters
from selfpruner_hub.search.seeds import seeds
from selfpruner_hub.slicing import Slicer, ordered, slice_model

PROMPTS, BETAS, MULTIPLES = (128, 512), (0.3, 0.5), (1, 32)


def main() -> None:
    """Time uniform plans: speed depends on widths alone, so nothing need be searched or repaired."""
    pruner = load_embedded()
    model = pruner.model
    windows = sample_windows(model, 8, 64, seed=0)
    order = rank(model, calibrate(model, windows))
    cases, models = [], [model]
    with ordered(model, order):
        slicer = Slicer(model, order, None)
        for beta in BETAS:
            for multiple_of in MULTIPLES:
                budget = Budget(pruner.shape, beta, multiple_of=multiple_of)
                models.append(slice_model(slicer, budget.project(seeds(budget)["uniform"])))
                cases.append({"beta": beta, "multiple_of": multiple_of})
    rows = []
    for length in PROMPTS:
        dense, *pruned = prefill_and_decode(models, sample_windows(model, 1, length, seed=1), runs=9)
        for case, candidate, timing in zip(cases, models[1:], pruned, strict=True):
            rows.append(
                {
                    **case,
                    "prompt": length,
                    "parameter_ratio": round(count_parameters(model) / count_parameters(candidate), 2),
                    **{f"{k}_speedup": round(dense[k].median / timing[k].median, 2) for k in dense},
                    **{f"{k}_ms": round(timing[k].median, 1) for k in dense},
                    **{f"dense_{k}_ms": round(dense[k].median, 1) for k in dense},
                }
            )
            print(rows[-1], flush=True)
    write(
        "latency",
        f"SmolLM2-135M-Instruct, {str(model.dtype)}, PyTorch on the CPU, batch 1, uniform FFN widths; prefill of the "
        "prompt and 16 decode steps, medians of 9 runs, all models interleaved",
        rows,
    )


if __name__ == "__main__":
    main()
