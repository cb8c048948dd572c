"""What matching the confidence of a pruned model to its parent's does, on text that nothing was chosen on.

Run: python benchmarks/confidence.py MODEL SEARCH_TEXT UNSEEN_TEXT
(here: a model of SmolLM2-135M-Instruct saved by `prune` with confidence=False, or before there was any; WikiText-2 raw,
articles a as it was made with, and articles b)
"""

from __future__ import annotations

import sys

from protocol import Unseen, write
from transformers import PreTrainedModel

from selfpruner_hub.confidence import match_confidence
from selfpruner_hub.corpus import load_corpus
from selfpruner_hub.demo import load_embedded
from selfpruner_hub.evaluation import divergence, teach
from selfpruner_hub.pruned_model import PrunedModel


def main(saved: str, search_text: str, unseen_text: str) -> None:
    """Measure before and after."""
    pruner, pruned = load_embedded(), PrunedModel.from_pretrained(saved)
    data = pruned.report.data
    sizes = [data[name]["tokens"] for name in ("calibration", "fitness")]
    corpus = load_corpus(search_text, pruner.tokenizer, tokens=sum(sizes), window=pruned.report.method["window"])
    _, held_out = corpus.split(*sizes, seed=pruned.report.seed)
    if held_out.record() != data["fitness"]:
        sys.exit(f"{saved} was not made with {search_text}.")
    unseen = Unseen(unseen_text, pruner.tokenizer)
    teacher = teach(pruner.model, unseen.windows[512])

    def measured(model: PreTrainedModel) -> dict[str, float]:
        return {**unseen.perplexities(model), "kl": round(divergence(model, unseen.windows[512], teacher), 4)}

    before = measured(pruned.model)
    scale = match_confidence(pruner.model, pruned.model, held_out.windows)
    write(
        "confidence",
        f"SmolLM2-135M-Instruct pruned at β = {pruned.report.beta}, {pruner.model.dtype}: before and after the logits "
        f"are scaled by the factor of least KL on the fitness text; unseen text: {Unseen.WORDS}; kl: over the parent's "
        "likeliest tokens, windows of 512",
        {"scale": scale, "dense": measured(pruner.model), "before": before, "after": measured(pruned.model)},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
