"""Find the best plan: make fitness and seed plans, run the search, and measure its gain on unseen text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
from torch import Tensor

from selfpruner_hub import ranks
from selfpruner_hub.calibration.texts import RunTexts
from selfpruner_hub.errors import ProposerError
from selfpruner_hub.evaluation.fitness import REMAINS, Fitness, SecondRepairScore
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import LossCurves
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.progress import Progress, noted
from selfpruner_hub.pruning.prepare import Prepared
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.journal_lines import AskLine, CheckLine, SeedsLine
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.outcome import SEARCH_TEXT, UNSEEN_TEXT, SearchResult, Standing
from selfpruner_hub.search.proposers import Operation, Proposal, Proposer, Scored
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.run import Run


def find_plan(
    proposer: Proposer,
    budget: Budget,
    ready: Prepared,
    texts: RunTexts,
    journal: Journal,
    settings: PruneSettings,
    run: Run,
) -> SearchResult:
    """Search for a plan, then compare it with the best seed plan on unseen text.

    Args:
        proposer: Source of rates.
        budget: Parameter budget that every plan is projected to.
        ready: Slicer that cuts the candidates, and the predicted losses of each layer.
        texts: Texts of the run: the fitness text, on which plans are selected, and the unseen one.
        journal: Journal of the search; its lines are replayed first, then new ones are appended.
        settings: Settings of the run.
        run: Progress (`Bars` also show a note) and random seed of the run.

    Returns:
        Outcome and gains; without a search (`evaluations=0`) or without unseen text, only the gain on the fitness text.
    """
    slicer, curves = ready.slicer, ready.curves
    schedule, windows = settings.schedule, texts.search.windows
    if not schedule.length:  # the first share is enough to choose among seeds
        windows = windows[: max(ranks.count(), round(schedule.first_share * len(windows)))]
        schedule = replace(schedule, first_share=1.0)
    scoring = curves if settings.weighs_excess else None
    fitness = _fitness(slicer, windows, settings, scoring)
    measure_steps = (
        fitness.measure_steps
        if isinstance(fitness, SecondRepairScore)
        else partial(fitness.measure_steps, curves=curves)
    )
    measure = partial(fitness.loss, share=schedule.first_share)
    effects = partial(measure_steps, share=schedule.first_share) if "refined" in settings.seeds else None
    rates = _journaled(journal, lambda: seeds(budget, curves if settings.predicts_losses else None, measure, effects))
    starts = {name: rates[name] for name in rates if name in settings.seeds}
    check = None
    if schedule.length and texts.unseen is not None and len(texts.unseen.windows) >= ranks.count():
        check = checked(journal, partial(_fitness, slicer, texts.unseen.windows, settings, scoring))
    reads = getattr(proposer, "reads_slopes", False) and not budget.shape.expert_weights  # which have no gradient
    problem = Problem(budget, starts, fitness, measure_steps if reads else None, check)
    price = float(getattr(proposer, "token_price", 0.0))
    on_score = _shown(run.progress, settings, price)
    if resume := getattr(proposer, "resume", None):
        asks = [line for line in journal.lines if isinstance(line, AskLine) and line.proposer == proposer.name]
        resume([reply.proposal for line in asks for reply in line.replies])
    outcome = search(_AskedOnce(proposer), problem, journal, schedule, seed=run.seed, on_score=on_score)
    gains = {SEARCH_TEXT: (outcome.best_seed.fitness, outcome.best.fitness)}
    if check is not None:
        gains[UNSEEN_TEXT] = check(outcome.best_seed.plan), check(outcome.best.plan)
    return SearchResult(outcome, gains, windows.numel())


class _AskedOnce:
    """A proposer that the first of several processes asks, for all."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self.name = proposer.name
        self.tell = proposer.tell

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> Sequence[Proposal]:
        """Ask for rates, as `Proposer.ask` does."""

        def attempt() -> Sequence[Proposal] | str:
            try:
                return list(self._proposer.ask(operation, history, count, rng))
            except ProposerError as error:
                return str(error)

        proposals = ranks.from_first(attempt)
        if isinstance(proposals, str):
            raise ProposerError(proposals)
        return proposals


def _journaled(journal: Journal, compute: Callable[[], dict[str, Rates]]) -> dict[str, Rates]:
    """Seed plans from the journal, or computed and journaled: they are measured, and devices round differently."""
    line = next((line for line in journal.lines if isinstance(line, SeedsLine)), None)
    return (line or journal.append(SeedsLine(compute()))).rates


def checked(journal: Journal, make: Callable[[], Callable[[Plan], float]]) -> Callable[[Plan], float]:
    """Make the function that scores a plan on unseen text; it scores each plan once, and journals that."""
    scores = {line.plan: line.fitness for line in journal.lines if isinstance(line, CheckLine)}
    made = cache(make)  # not before a plan is new: it runs the dense model on the text

    def check(plan: Plan) -> float:
        if plan not in scores:
            started = time.perf_counter()
            score = made()(plan)
            line = journal.append(CheckLine(score, plan, round(time.perf_counter() - started, 3)))
            scores[plan] = line.fitness
        return scores[plan]

    return check


def _fitness(
    slicer: Slicer, windows: Tensor, settings: PruneSettings, curves: Sequence[LossCurves] | None
) -> Fitness | SecondRepairScore:
    """Make the fitness that is minimised; with `curves`, the one that allows for the second repair."""
    fitness = Fitness(slicer, windows, settings.fitness, settings.kv_multiple)
    return fitness if curves is None else SecondRepairScore(fitness, curves, REMAINS)


def _shown(progress: Progress, settings: PruneSettings, token_price: float) -> Callable[[Standing], None]:
    """Report the evaluations spent; bars also show the best plan, and the tokens and cost of a language model."""

    def show(at: Standing) -> None:
        note = [f"round {at.round}"]
        if at.best is not None:
            note.append(f"best {settings.fitness} {at.best.fitness:.4f} ({at.best.origin})")
        if at.tokens:
            cost = f", ${at.tokens * token_price / 1e6:.2f}" if token_price else ""
            note.append(f"{at.tokens / 1000:.1f}k tokens{cost}")
        length = settings.schedule.length
        noted(progress, "searching", min(at.spent, length), length, ", ".join(note))

    return show
