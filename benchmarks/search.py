"""What a long search finds beyond the default's starting plans, judged after the second repair on unseen text.

Run: python benchmarks/search.py WORK SEARCH_TEXT UNSEEN_TEXT [--betas …] [--methods …] [--evaluations N] [--tokens N]
(here: WikiText-2 raw, articles a beside the model's own conversations, articles b for the figures)
WORK keeps a row for each β and method, the journals and the text that the model writes: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from defaults import DATA
from protocol import Chat, Rows, Unseen, arguments, paired, write
from transformers import PreTrainedModel

from selfpruner_hub.calibration.texts import RunTexts, Texts
from selfpruner_hub.evaluation.metrics import divergence, teach
from selfpruner_hub.models.loading import EMBEDDED_MODEL, embedded_model
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.prepare import fisher_information, prepared
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import slice_model
from selfpruner_hub.pruning.temperature import match_confidence
from selfpruner_hub.search.choose_proposer import choose_proposer
from selfpruner_hub.search.find_plan import find_plan
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.journal_lines import RoundLine
from selfpruner_hub.search.outcome import SEARCH_TEXT, UNSEEN_TEXT
from selfpruner_hub.settings import SEARCH, PruneSettings, SearchSchedule
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run

CONTROL = "no search"
"""The best of the starting plans, which the default takes."""


def main(words: Sequence[str] | None = None) -> None:
    """Search with every method at every β, repair the best plan of each, and measure it."""
    options = _parser().parse_args(words)
    rows, pruner = Rows(options.work / "rows.jsonl"), AutoPruner.from_pretrained(**embedded_model())
    settings = replace(
        PruneSettings(),
        calibration_tokens=options.tokens,
        fisher_tokens=options.tokens // 4,
        fitness_tokens=options.tokens // 2,
        schedule=SearchSchedule(options.evaluations, patience=0),
    )
    run = Run(checkpoints=Checkpoints(options.work / "text"), progress=_tell)
    texts = Texts(pruner.model, pruner.tokenizer).read(DATA + options.search_text, settings, run)
    articles = Unseen(options.unseen_text, pruner.tokenizer).windows[512]
    teachers = [teach(pruner.model, window[None]) for window in articles]
    chat = Chat(pruner.model, pruner.tokenizer, options.work)
    for beta in options.betas:
        missing = [name for name in options.methods if not rows.have(beta=beta, method=name)]
        for row, model in searched(pruner, beta, missing, texts, settings, options.work) if missing else ():
            if not rows.have(beta=beta, method=row["method"]):
                divergences = [divergence(model, w[None], t) for w, t in zip(articles, teachers, strict=True)]
                rows.keep({**row, **chat.figures(model), "kl_by_window": [round(value, 5) for value in divergences]})
    write(
        "search",
        f"SmolLM2-135M-Instruct, {pruner.model.dtype}: the default's settings with {settings.calibration_tokens} "
        f"calibration, {settings.fisher_tokens} Fisher and {settings.fitness_tokens} fitness tokens of "
        f"{DATA}{Path(options.search_text).name}, and {options.evaluations:g} evaluations in place of the "
        f"{SEARCH} of a usual search; selected: the score that a search lowers, elsewhere: the same on text that "
        "neither it nor a repair has read. The best plan of each is repaired twice and its confidence matched. KL to "
        f"the dense model on {len(articles)} windows of 512 tokens of {Path(options.unseen_text).name}, on which "
        f"nothing was chosen; difference: mean difference in nats a token from {CONTROL} on the same windows, and its "
        f"standard error over windows; {chat.words}",
        compared(sorted(rows, key=lambda row: (row["beta"], row["method"] != CONTROL, row["method"]))),
        options.output,
    )


def searched(
    pruner: AutoPruner, beta: float, methods: Sequence[str], texts: RunTexts, settings: PruneSettings, work: Path
) -> Iterator[tuple[dict[str, Any], PreTrainedModel]]:
    """Yield the figures of a search, and its best plan repaired; the best of the starting plans comes first."""
    budget, windows, run = Budget(pruner.shape, beta), texts.calibration.windows, Run(progress=_tell)
    fisher = fisher_information(pruner.model, windows, settings, run)
    rows: list[tuple[dict[str, Any], Plan]] = []
    with prepared(pruner.model, windows, settings, fisher, run) as ready:
        for name in methods:
            journal = Journal(work / f"{beta:g}-{name}", {"beta": beta, **settings.record()})
            proposer = choose_proposer(name, None, None, budget, True, EMBEDDED_MODEL, (pruner.model, pruner.tokenizer))
            result = find_plan(proposer, budget, ready, texts, journal, settings, run)
            pairs = zip(("selected", "elsewhere"), (result.gains[t] for t in (SEARCH_TEXT, UNSEEN_TEXT)), strict=True)
            gains = {key: [round(value, 4) for value in pair] for key, pair in pairs}
            for index, best in enumerate((result.outcome.best_seed, result.outcome.best)):
                figures = {"best_from": best.origin, **{key: pair[index] for key, pair in gains.items()}}
                rows.append(({"method": (CONTROL, name)[index], "beta": beta, **figures}, best.plan))
            curve = [(line.spent, round(line.best, 4)) for line in journal.lines if isinstance(line, RoundLine)]
            rows[-1][0].update(evaluations=result.outcome.spent, replies=result.outcome.counts, curve=curve)
        models = {plan: slice_model(ready.slicer, plan) for plan in {plan for _, plan in rows}}
    for model in models.values():
        compensate(pruner.model, model, windows, fisher=fisher, run=run)
        match_confidence(pruner.model, model, texts.search.windows)
    for row, plan in rows:
        yield row, models[plan]


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of all rows, each with its difference from no search at the same β."""
    control = {row["beta"]: row["kl_by_window"] for row in rows if row["method"] == CONTROL}
    results = []
    for row in rows:
        result = {key: value for key, value in row.items() if key != "kl_by_window"}
        result["kl_articles"] = round(mean(row["kl_by_window"]), 4)
        if row["method"] != CONTROL:
            result |= paired(row["kl_by_window"], control[row["beta"]])
        results.append(result)
    return results


def _tell(what: str, done: int | float, total: int | float) -> None:
    if done == total or (what == "searching" and not round(done) % 10):
        print(f"{what}: {done:g} of {total:g}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("--betas", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--methods", nargs="+", default=["evolution", "slopes"])
    parser.add_argument("--evaluations", type=float, default=10 * SEARCH)
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    return parser


if __name__ == "__main__":
    main()
