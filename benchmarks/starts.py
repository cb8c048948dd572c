"""Plans that a search could start from: our seeds, and other methods' global thresholds, with our order and repair.

Run: python benchmarks/starts.py WORK SEARCH_TEXT BETAS
(here: WikiText-2 raw, articles a; nothing is reported on them; 0.3,0.5)
Rows that exist in WORK are reused.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ours import CALIBRATION, FITNESS, SETTINGS, Ours, texts
from peers import Flap, taylor
from protocol import Rows, write
from quality import GRADIENT_WINDOWS
from torch import Tensor

from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.metrics import teach
from selfpruner_hub.plans.budget import ParameterBudget, Rates

OTHER = 8_192
"""Number of tokens of a further text, on which no seed plan measures anything."""
FIRST_ORDER = "first-order threshold"
HALFWAY = "{}, half-way to uniform"
CONTENDERS = ("uniform", "sensitivity", FIRST_ORDER, HALFWAY.format(FIRST_ORDER))
"""Plans that are repaired twice (5 minutes each): the likely best ones, and `uniform` as the baseline."""


def threshold(budget: ParameterBudget, scores: list[Tensor]) -> Rates:
    """FFN rates that remove the channels with the lowest scores over all layers, until the budget is met."""
    every = torch.cat(scores).sort().values
    shape = budget.shape
    cut = round(budget.beta * shape.weights(shape.dense) / shape.channel_weights)
    rates = [float((each < every[cut]).float().mean()) for each in scores]
    return Rates((0.0,) * len(rates), tuple(rates))


def halfway(budget: ParameterBudget, one: Rates, other: Rates) -> Rates:
    """Mean of the rates of two plans on the budget."""
    a, b = (budget.rates(budget.project(rates)) for rates in (one, other))

    def mean(x: tuple[float, ...], y: tuple[float, ...]) -> tuple[float, ...]:
        return tuple((i + j) / 2 for i, j in zip(x, y, strict=True))

    return Rates(mean(a.attention, b.attention), mean(a.ffn, b.ffn))


def main(work: Path, search_text: str, betas: list[float]) -> None:
    """Cut, repair and measure every plan."""
    pruner, rows = load_embedded(), Rows(work / "starts.jsonl")
    model = pruner.model
    calibration, fitness_text, other = texts(pruner, search_text, OTHER)
    statistics = calibrate(model, calibration)
    ours, known = Ours.of(pruner, statistics, [calibration, fitness_text], work), Flap(model, statistics)
    first_order = taylor(model, calibration[:GRADIENT_WINDOWS])
    model.requires_grad_(False)
    read = {name: (windows, teach(model, windows)) for name, windows in (("search", fitness_text), ("other", other))}
    for beta in betas:
        budget = ParameterBudget(pruner.shape, beta)
        found = ours.starts(budget)
        for name, rates in (
            ("FLAP's threshold", budget.rates(known.plan(beta))),
            (FIRST_ORDER, threshold(budget, first_order)),
        ):
            found |= {name: rates, HALFWAY.format(name): halfway(budget, rates, found["uniform"])}
        for name, rates in found.items():
            if not rows.have(start=name, beta=beta):
                losses = ours.losses(budget.project(rates), read, twice=name in CONTENDERS)
                rows.keep({"start": name, "beta": beta} | losses)
        write(
            "starts",
            f"SmolLM2-135M-Instruct, {model.dtype}, {CALIBRATION} calibration tokens of {Path(search_text).name}, "
            f"order of OBS; KL to the dense model on another {FITNESS}, those of the search, and on {OTHER} more, "
            f"after the first repair, and after the second of {', '.join(CONTENDERS)}; our seeds measure on "
            f"{SETTINGS.first_share:g} of those of the search; predicted: the sum of the losses of the layers alone; "
            "thresholds: units of least score go, in all layers: FLAP's standardised scores of KV groups and channels; "
            f"|w · gradient| of channels, on the first {GRADIENT_WINDOWS} windows",
            rows,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [float(beta) for beta in sys.argv[3].split(",")])
