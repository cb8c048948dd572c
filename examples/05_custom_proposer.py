"""Search with a proposer of your own: any object with a name, `ask` and `tell`.

python examples/05_custom_proposer.py HuggingFaceTB/SmolLM2-135M-Instruct
"""

import sys
from collections.abc import Sequence

import numpy as np

from selfpruner_hub import AutoPruner
from selfpruner_hub.plans.budget import Rates
from selfpruner_hub.search.proposers import Operation, Proposal, Scored


class NoisyCopies:
    """Proposes the best plan so far with noise on its FFN rates. The search moves each proposal onto the budget."""

    name = "noisy copies"

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Give `count` proposals; `history` has all plans that were scored, best first."""
        best = history[0].rates
        noise = rng.normal(scale=0.05, size=(count, len(best.ffn)))
        return [Proposal(Rates(best.attention, tuple((best.ffn + each).clip(0, 1).tolist()))) for each in noise]

    def tell(self, scored: Sequence[Scored]) -> None:
        """Take note of how the last proposals did; this proposer reads the history instead."""


pruned = AutoPruner.from_pretrained(sys.argv[1]).prune(beta=0.3, proposer=NoisyCopies())
pruned.save_pretrained("pruned-by-noisy-copies")
print(f"The best plan came from {pruned.report.proposer['best_from']}.")
