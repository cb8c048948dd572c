"""The main job with its defaults on SmolLM2-135M-Instruct: quality on text that nothing was chosen on.

Run: python benchmarks/main_job.py SEARCH_TEXT MEASURED_TEXT [BETA …]
(here: WikiText-2 raw, articles a for calibration and search, articles b for measurement)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from protocol import write

from selfpruner_hub.corpus import consecutive_windows
from selfpruner_hub.demo import load_embedded
from selfpruner_hub.evaluation import divergence, perplexity, teach
from selfpruner_hub.provenance import count_parameters

WINDOW, WINDOWS = 512, 32
VARIANTS = {
    "uniform Wanda-sp, FFN only, no repair": {"repair": False, "seeds": ("uniform",), "evaluations": 0},
    "uniform FFN with repair": {"seeds": ("uniform",), "evaluations": 0},
    "best seed": {"evaluations": 0},
    "searched, proposer=evolution": {"proposer": "evolution"},
    "searched, proposer=self": {"proposer": "self"},
}


def main(search_text: str, measured_text: str, betas: list[float]) -> None:
    """Measure every variant at every β, beside the dense model."""
    pruner = load_embedded()
    windows = consecutive_windows(measured_text, pruner.tokenizer, WINDOW, WINDOWS).windows
    teacher = teach(pruner.model, windows)
    dense = {"variant": "dense", "beta": 0.0, "parameters": count_parameters(pruner.model)}
    rows = [{**dense, "perplexity": round(perplexity(pruner.model, windows), 2), "kl": 0.0}]
    print(rows[0], flush=True)
    for beta in betas:
        for name, settings in VARIANTS.items():
            started = time.perf_counter()
            pruned = pruner.prune(beta, data=search_text, progress=False, **settings)
            seconds = time.perf_counter() - started
            rows.append(
                {
                    "variant": name,
                    "beta": beta,
                    "parameters": pruned.report.parameters["pruned"],
                    "perplexity": round(perplexity(pruned.model, windows), 2),
                    "kl": round(divergence(pruned.model, windows, teacher), 4),
                    "search_fitness": pruned.report.metrics["search_fitness"].value,
                    "best_from": pruned.report.proposer["best_from"],
                    "seconds": round(seconds),
                }
            )
            print(rows[-1], flush=True)
    write(
        "main_job",
        f"SmolLM2-135M-Instruct, {str(pruner.model.dtype)}; calibrated and searched on {Path(search_text).name} with "
        f"the defaults of prune(), seed 0; perplexity and top-64 KL to dense on the first {WINDOWS} windows of "
        f"{WINDOW} tokens of {Path(measured_text).name}",
        rows,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [float(b) for b in sys.argv[3:]] or [0.3])
