"""The parts of our method, so that benchmarks can measure each of them with the same calibration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.calibration.corpus import load_corpus
from selfpruner_hub.calibration.fisher import Fisher, output_fisher
from selfpruner_hub.calibration.statistics import LayerStatistics
from selfpruner_hub.cli.demo import NAME
from selfpruner_hub.evaluation.fitness import REMAINS, Fitness, SecondRepairScore
from selfpruner_hub.evaluation.metrics import Teacher, divergence
from selfpruner_hub.plans.budget import ParameterBudget, Rates
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import LossCurves, loss_alone
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.importance import LayerOrder, rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import Slicer, slice_model
from selfpruner_hub.pruning.temperature import match_confidence
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.llm.local_model import ModelProposer
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.settings import LanguageModelOptions, PruneSettings, SearchSchedule

WINDOW, CALIBRATION, FITNESS = 512, 32_768, 8_192
SCHEDULE = SearchSchedule(evaluations=16, patience=0, population=4)


def texts(pruner: AutoPruner, search_text: str, *others: int) -> list[Tensor]:
    """Windows of the calibration text, of the fitness text, and of `others`: further parts with these token counts."""
    sizes = (CALIBRATION, FITNESS, *others)
    corpus = load_corpus(search_text, pruner.tokenizer, tokens=sum(sizes), window=WINDOW)
    return [part.windows for part in corpus.split(*sizes)]


def removed(pruner: AutoPruner, layers: nn.ModuleList) -> float:
    """Share of the prunable weights that was removed, counted from the layers' tensors."""
    kept = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
    return 1 - kept / pruner.shape.weights(pruner.shape.dense)


def groups_removed(pruner: AutoPruner, plan: Plan) -> int:
    """Number of KV groups that a plan removes, over all layers."""
    dense, left = ([layer.num_key_value_heads for layer in p.layers] for p in (pruner.shape.dense, plan))
    return sum(dense) - sum(left)


class Ours:
    """The parts of our method, with one calibration.

    Args:
        pruner: Pruner of the dense model.
        statistics: Calibration statistics, one for each layer.
        windows: Windows of the calibration text and of the fitness text, each `[N, 512]`.
        fisher: Fisher information of the dense layers' outputs.
        order: Order of channels and KV groups, one for each layer.
        work: Directory of the search journals and of models.
    """

    def __init__(
        self,
        pruner: AutoPruner,
        statistics: list[LayerStatistics],
        windows: list[Tensor],
        fisher: Fisher,
        order: list[LayerOrder],
        work: Path,
    ) -> None:
        self._pruner, self._model, self._statistics, self._windows = pruner, pruner.model, statistics, windows
        self._calibration, self._fitness_text = windows
        self.fisher, self.order, self._work = fisher, order, work
        with self._ordered():
            self._slicer = Slicer(self._model, order, statistics, fisher=fisher)
        self._plans: dict[tuple[float, str, float], Plan] = {}

    @classmethod
    def of(cls, pruner: AutoPruner, statistics: list[LayerStatistics], windows: list[Tensor], work: Path) -> Ours:
        """Make an instance with the default order."""
        fisher = output_fisher(pruner.model, windows[0][: PruneSettings.fisher_tokens // WINDOW])
        order = rank(pruner.model, statistics, "obs", fisher=fisher)
        return cls(pruner, statistics, windows, fisher, order, work)

    @cached_property
    def curves(self) -> list[LossCurves]:
        """Predicted loss of each layer alone, by its widths."""
        return self._slicer.loss_curves()

    @contextmanager
    def _ordered(self) -> Iterator[None]:
        with ordered(self._model, self.order):
            yield

    def plan(self, beta: float, how: str, remains: float = 1.0) -> Plan:
        """Make a plan: uniform FFN rates, the best seed plan by KL, or the best plan of a search by the model itself.

        Args:
            beta: Mean share of the prunable weights to remove.
            how: Kind of plan: `"uniform"`, `"seed"`, or the fitness of a search.
            remains: Share of the excess that counts, 0 to 1; see `SecondRepairScore`.
        """
        if (beta, how, remains) not in self._plans:
            budget = ParameterBudget(self._pruner.shape, beta)
            with self._ordered():
                if how == "uniform":
                    plan = budget.project(seeds(budget)["uniform"])
                else:
                    metric = how if how == "perplexity" else "kl"
                    fitness = self._score(metric, remains)
                    starts = self._starts(budget, fitness)
                    if how == "seed":
                        plan = min(map(budget.project, starts.values()), key=fitness)
                    else:
                        plan = self._searched(budget, f"{how}-{remains:g}", fitness, starts)
            self._plans[beta, how, remains] = plan
        return self._plans[beta, how, remains]

    def starts(self, budget: ParameterBudget) -> dict[str, Rates]:
        """Our seed plans, measured by KL with the score for the second repair."""
        with self._ordered():
            return self._starts(budget, self._score("kl", REMAINS))

    def _score(self, metric: str, remains: float) -> SecondRepairScore:
        return SecondRepairScore(Fitness(self._slicer, self._fitness_text, metric), self.curves, remains)

    def _starts(self, budget: ParameterBudget, fitness: SecondRepairScore) -> dict[str, Rates]:
        return seeds(budget, self.curves, partial(fitness.loss, share=SCHEDULE.first_share))

    def _searched(
        self, budget: ParameterBudget, name: str, fitness: SecondRepairScore, starts: dict[str, Rates]
    ) -> Plan:
        asked = ModelProposer(self._model, self._pruner.tokenizer, budget, NAME, LanguageModelOptions())
        journal = Journal(self._work / f"search-{budget.beta}-{name}", {"beta": budget.beta, "fitness": name})
        found = search(asked, Problem(budget, starts, fitness, fitness.measure_steps), journal, SCHEDULE)
        return found.best.plan

    def once(self, beta: float, how: str) -> tuple[float, PreTrainedModel]:
        """Make a plan and cut it with the first repair."""
        return self.cut(self.plan(beta, how))

    def under(self, order: list[LayerOrder], beta: float, how: str) -> tuple[float, PreTrainedModel]:
        """Cut the same plan with the same repair, but another order of channels or KV groups."""
        other = Ours(self._pruner, self._statistics, self._windows, self.fisher, order, self._work)
        return other.cut(self.plan(beta, how))

    @lru_cache(maxsize=1)  # noqa: B019
    def twice(
        self, beta: float, how: str, remains: float = REMAINS, inputs: bool = True, alike: bool = False
    ) -> tuple[float, PreTrainedModel]:
        """Cut a plan with both repairs. `inputs`: the second moves gate and up too; `alike`: without Fisher weights."""
        share, pruned = self.cut(self.plan(beta, how, remains))
        compensate(self._model, pruned, self._calibration, inputs=inputs, fisher=None if alike else self.fisher)
        return share, pruned

    def cut(self, plan: Plan) -> tuple[float, PreTrainedModel]:
        """Cut a plan with the first repair; return the share of removed weights and the model."""
        with self._ordered():
            pruned = slice_model(self._slicer, plan)
        return removed(self._pruner, pruned.get_decoder().layers), pruned

    def losses(self, plan: Plan, read: dict[str, tuple[Tensor, Teacher]], twice: bool) -> dict[str, float]:
        """Predicted loss of a plan, and its KL to the dense model on each text, after one repair or both."""
        row: dict[str, float] = {"kv_groups_removed": groups_removed(self._pruner, plan)}
        row["predicted"] = round(loss_alone(self.curves, plan), 4)
        _, model = self.cut(plan)
        for repair in ("first", "second")[: 1 + twice]:
            if repair == "second":
                compensate(self._model, model, self._calibration, fisher=self.fisher)
            row |= {f"{repair}_{text}": round(divergence(model, *known), 4) for text, known in read.items()}
        return row

    def sure(self, beta: float) -> tuple[float, PreTrainedModel]:
        """Cut a searched plan with all parts: both repairs and the scaling of the logits."""
        share, repaired = self.twice(beta, "kl")
        pruned = copy.deepcopy(repaired)
        match_confidence(self._model, pruned, self._fitness_text)
        return share, pruned
