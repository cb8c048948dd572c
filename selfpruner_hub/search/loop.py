"""The search loop: ask for rates, project them to the budget, score the plans in stages, journal, and tell.

The loop is a pure function of its journal: asks and scores that it holds are replayed instead of repeated, and the
random state of every ask is derived from (seed, round, attempt). A search that was killed at any point and resumed
therefore reaches the same plan as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from selfpruner_hub.errors import ProposerError, SelfPrunerError, UserError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import StepEffects
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.journal_lines import AskLine, ProbeLine, Reply, RoundLine, ScoreLine
from selfpruner_hub.search.outcome import Outcome, Standing
from selfpruner_hub.search.proposers import EvolutionProposer, Operation, Proposal, Proposer, Scored
from selfpruner_hub.search.schedule import rounds
from selfpruner_hub.settings import SearchSchedule

Score = Callable[[Plan, float], float]
"""(plan, share of the windows) → fitness, lower is better."""
MeasureSteps = Callable[[Plan, float], StepEffects]
"""(plan, share of the windows) → predicted change of the loss for one step more or less of every layer."""

PROBE_COST = 5.0
"""Cost of a probe, in scores on the same number of windows: a forward and a backward pass, and the dense parts
again."""
SURVIVING_SEEDS = 0.5
"""Share of the seed plans that is scored on all windows."""
ASK_ATTEMPTS = 2
"""Number of times that a proposer is asked before evolution's children replace its bad replies."""
BARREN_ROUNDS = 8
"""Number of rounds in a row without a new plan after which the search ends."""
LEAST_GAIN = 0.001
"""Smallest gain on unseen text for which a search goes on, as a share of the score."""


@dataclass(frozen=True)
class Problem:
    """Search problem: find the plan on a budget with the lowest score."""

    budget: Budget
    """Parameter budget that every plan is projected to."""
    seeds: Mapping[str, Rates]
    """Rates of the seed plans, by name; at least one."""
    score: Score
    """Function that scores one plan."""
    measure_steps: MeasureSteps | None = None
    """Function that predicts the effect of small changes of the best plan, for proposers that read it; a call counts as
    `PROBE_COST` scores."""
    check: Callable[[Plan], float] | None = None
    """Function that scores a plan on unseen text, by which no plan is chosen; None ends no search early."""


def search(
    proposer: Proposer,
    problem: Problem,
    journal: Journal,
    schedule: SearchSchedule,
    *,
    seed: int = 0,
    on_score: Callable[[Standing], None] | None = None,
) -> Outcome:
    """Run (or resume) a search.

    Args:
        proposer: Source of rates.
        problem: Budget, seed plans and score.
        journal: Journal of the search; its lines are replayed first, then new ones are appended.
        schedule: Length of the search, and how its rounds spend it.
        seed: Random seed.
        on_score: Function that is called with the state of the search after every evaluation.

    Returns:
        The outcome; its best plan is never worse than the best seed plan on the same windows.

    Raises:
        RunMismatchError: The journal has plans that this search cannot have made.
        UserError: The proposer gave a proposal that cannot be journaled.
    """
    run = _Search(proposer, problem, journal, schedule, seed, on_score)
    run.score_round(0, [(f"seed:{name}", problem.budget.project(rates)) for name, rates in problem.seeds.items()])
    best_seed = run.incumbent()
    barren = idle = 0
    for number, operation, count in rounds(schedule):
        if run.spent >= schedule.length or barren == BARREN_ROUNDS or 0 < schedule.patience <= idle:
            break
        before = run.incumbent().plan
        run.measure_steps(number)
        children = run.ask(number, operation, count)
        barren = 0 if children else barren + 1
        if children:
            proposer.tell(run.score_round(number, children))
        run.close_round(number, operation)
        idle = 0 if run.gained(before) else idle + 1
    return Outcome(run.incumbent(), best_seed, run.spent, dict(run.counts), run.tokens)


@dataclass
class _Search:
    proposer: Proposer
    problem: Problem
    journal: Journal
    schedule: SearchSchedule
    seed: int
    on_score: Callable[[Standing], None] | None
    spent: float = 0.0
    tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[Plan, Scored] = field(default_factory=dict)
    """Scores on the first share of the windows, by plan."""
    full: dict[Plan, Scored] = field(default_factory=dict)
    """Scores on all windows, by plan."""
    effects: dict[Plan, StepEffects] = field(default_factory=dict)
    """Predicted effects of small changes, by plan, where measured."""

    def __post_init__(self) -> None:
        self.journal.check_plans(self.problem.budget)
        lines = self.journal.lines
        self._asks = {(line.round, line.attempt): line for line in lines if isinstance(line, AskLine)}
        self._scores = {(line.plan, line.share): line.fitness for line in lines if isinstance(line, ScoreLine)}
        self._probed = {line.plan: line.slopes for line in lines if isinstance(line, ProbeLine)}
        self._closed = {line.round for line in lines if isinstance(line, RoundLine)}
        self._before: Counter[str] = Counter()
        self._moved: list[float] = []

    def incumbent(self) -> Scored:
        """Return the best plan that was scored on all windows; of equal plans, the earlier one."""
        return min(self.full.values(), key=lambda s: s.fitness)

    def history(self) -> list[Scored]:
        """Return all plans scored on the first share of the windows, best first."""
        best = self.incumbent().plan
        scored = (replace(s, slopes=self.effects.get(best)) if s.plan == best else s for s in self.first.values())
        return sorted(scored, key=lambda s: s.fitness)

    def measure_steps(self, number: int) -> None:
        """Predict the effects of small changes of the incumbent, once for each plan."""
        plan, share = self.incumbent().plan, self.schedule.probe_share
        if self.problem.measure_steps is None or not share or plan in self.effects:
            return
        if plan not in self._probed:
            started = time.perf_counter()
            effects = self.problem.measure_steps(plan, share)
            line = self.journal.append(ProbeLine(number, PROBE_COST * share, effects, plan, _seconds_since(started)))
            self._probed[plan] = line.slopes
        self.effects[plan] = self._probed[plan]
        self.spent += PROBE_COST * share

    def gained(self, before: Plan) -> bool:
        """Whether the incumbent is better than the one `before` this round on unseen text too, if there is any."""
        now, check = self.incumbent().plan, self.problem.check
        if not self.schedule.patience or check is None:
            return True
        return now != before and check(now) <= (1 - LEAST_GAIN) * check(before)

    # -- asking ---------------------------------------------------------------------------------------------------

    def ask(self, number: int, operation: Operation, count: int) -> list[tuple[str, Plan]]:
        """Ask, ask again in place of refused and duplicate proposals, and fill the rest with evolution's children."""
        children: list[tuple[str, Plan]] = []
        seen = set(self.first)
        for attempt in range(ASK_ATTEMPTS):
            missing = count - len(children)
            if missing:
                self._accept(
                    self._replies(self.proposer, number, attempt, operation, missing),
                    self.proposer.name,
                    children,
                    seen,
                )
        fallback = EvolutionProposer(self.problem.budget)
        for attempt in range(ASK_ATTEMPTS, ASK_ATTEMPTS + 4):
            missing = count - len(children)
            if missing:
                self.counts["replaced"] += missing if attempt == ASK_ATTEMPTS else 0
                self._accept(self._replies(fallback, number, attempt, operation, missing), "fallback", children, seen)
        return children

    def _accept(self, replies: Sequence[Reply], origin: str, children: list[tuple[str, Plan]], seen: set[Plan]) -> None:
        for plan in (reply.plan for reply in replies):
            if plan is None:
                self.counts["refused"] += 1
            elif plan in seen:
                self.counts["duplicate"] += 1
            else:
                self.counts["accepted"] += 1
                seen.add(plan)
                children.append((origin, plan))

    def _replies(
        self, proposer: Proposer, number: int, attempt: int, operation: Operation, count: int
    ) -> Sequence[Reply]:
        line = self._asks.get((number, attempt))
        if line is None:
            line = self._ask_live(proposer, number, attempt, operation, count)
        self._moved += [reply.moved for reply in line.replies if reply.moved is not None]
        self.tokens += sum(reply.proposal.tokens for reply in line.replies)
        return line.replies

    def _ask_live(self, proposer: Proposer, number: int, attempt: int, operation: Operation, count: int) -> AskLine:
        state, history = (self.seed, number, attempt), self.history()
        started = time.perf_counter()
        try:
            proposals = list(proposer.ask(operation, history, count, np.random.default_rng(state)))[:count]
        except ProposerError as error:
            proposals = [Proposal(None, error=str(error))]
        replies = tuple(self._projected(proposal, history) for proposal in proposals)
        seconds = _seconds_since(started)
        try:
            return self.journal.append(AskLine(number, attempt, operation, proposer.name, state, replies, seconds))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The proposer {proposer.name!r} gave a malformed proposal: {error}.", "Give the types of Proposal."
            ) from error

    def _projected(self, proposal: Proposal, history: Sequence[Scored]) -> Reply:
        """Project a proposal to the budget; one whose rates cannot be projected becomes a refusal."""
        if proposal.rates is None:
            return Reply(proposal)
        only = proposal.parents[0] if len(proposal.parents) == 1 else -1
        parent = history[only].rates if 0 <= only < len(history) else None
        try:
            plan = self.problem.budget.project(proposal.rates, parent)
        except SelfPrunerError as error:
            return Reply(replace(proposal, rates=None, error=str(error)))
        return Reply(proposal, plan, round(self.problem.budget.distance(proposal.rates, plan), 6))

    def close_round(self, number: int, operation: Operation) -> None:
        """Journal how many proposals of a round were accepted, and the state of the search after it."""
        if number not in self._closed:
            best, counts = self.incumbent(), dict(self.counts - self._before)
            moved = round(sum(self._moved) / len(self._moved), 6) if self._moved else None
            self.journal.append(
                RoundLine(number, operation, counts, moved, best.fitness, best.origin, self.spent, self.tokens)
            )
        self._before, self._moved = self.counts.copy(), []

    # -- scoring --------------------------------------------------------------------------------------------------

    def score_round(self, number: int, children: Sequence[tuple[str, Plan]]) -> list[Scored]:
        """Score all plans on the first share of the windows, then the survivors on all windows."""
        unique: dict[Plan, str] = {}
        for origin, plan in children:  # two seeds may give the same plan: the first is its origin
            unique.setdefault(plan, origin)
        scored = self._scored([(origin, plan) for plan, origin in unique.items()], self.schedule.first_share, number)
        self.first.update({s.plan: s for s in scored})
        ranked = sorted(scored, key=lambda s: s.fitness)
        share = self.schedule.survivors if number else SURVIVING_SEEDS
        keep = max(1, math.ceil(share * len(ranked)))
        survivors = ranked if self.schedule.first_share >= 1 else ranked[:keep]
        self._scored([(survivor.origin, survivor.plan) for survivor in survivors], 1.0, number)
        return scored

    def _scored(self, children: Sequence[tuple[str, Plan]], share: float, number: int) -> list[Scored]:
        """Score (origin, plan) pairs, and journal each score as soon as it is seen."""
        scored = []
        for origin, plan in children:
            if (plan, share) not in self._scores:
                self._score_live(plan, share, origin, number)
            if not (share == 1.0 == self.schedule.first_share and plan in self.first):  # scored once, counted once
                self.spent += share
            scored.append(
                Scored(plan, self.problem.budget.rates(plan), self._scores[plan, share], share, origin, number)
            )
            if share == 1.0:
                self.full[plan] = scored[-1]
            if self.on_score:
                best = min(self.full.values(), key=lambda s: s.fitness, default=None)
                self.on_score(Standing(number, self.spent, best, self.tokens))
        return scored

    def _score_live(self, plan: Plan, share: float, origin: str, number: int) -> None:
        started = time.perf_counter()
        value = self._scores[plan, share] = self.problem.score(plan, share)
        self.journal.append(ScoreLine(number, origin, share, value, plan, _seconds_since(started)))


def _seconds_since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
