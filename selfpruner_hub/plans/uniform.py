"""The budget of models that are stock models: one FFN width for all layers, and all of their attention.

In a mixture of experts, every layer that has routed experts keeps the same number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from selfpruner_hub.errors import BudgetError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import Plan


@dataclass(frozen=True)
class UniformBudget(Budget):
    """A budget that one plan meets: every proposal is projected to it.

    Raises:
        BudgetError: The layers have different widths, attention is to be cut as well, or a field of
            `Budget` is wrong.
    """

    def __post_init__(self) -> None:
        """Keep all attention; check the values."""
        dense = self.shape.dense.layers
        if len({w for w in dense if w.intermediate_size}) > 1:
            raise BudgetError(
                "A uniform plan needs layers of one width, and this model's differ.", "Leave out uniform."
            )
        if self.tied or self.p_min:
            raise BudgetError("A uniform plan cuts the FFNs alone.", "Leave out tied and p_min.")
        object.__setattr__(self, "shape", replace(self.shape, whole_attention=True))
        super().__post_init__()

    @cached_property
    def tolerance(self) -> float:
        """Maximum accepted difference from β: half of a step, which all layers make together."""
        shares = [self.removed_share(plan) for plan in self._plans[:2]]
        return max(super().tolerance, abs(shares[0] - shares[-1]) / 2 + 1e-9)

    def project(self, rates: Rates, parent: Rates | None = None) -> Plan:
        """Return the plan nearest to β; of a target, the widest that reaches it. See `Budget.project`."""
        self._check(rates)
        return self._plan

    @cached_property
    def _plan(self) -> Plan:
        reached = [plan for plan in self._plans if self.removed_share(plan) >= self.share - 1e-9]
        if self.target is not None and reached:
            return max(reached, key=lambda plan: max(plan.layers))
        return min(self._plans, key=lambda plan: abs(self.removed_share(plan) - self.share))

    @cached_property
    def _plans(self) -> Sequence[Plan]:
        """All plans within the bounds, narrowest first; a layer without experts keeps its 0."""
        dense = self.shape.dense.layers
        full = max(w.intermediate_size for w in dense)
        low, high = max(self._ffn_bounds([0] * len(dense)))
        groups = [w.num_key_value_heads for w in dense]
        widths = [full - units * self.multiple_of for units in range(high, low - 1, -1)]
        return [self.shape.plan([min(width, w.intermediate_size) for w in dense], groups) for width in widths]
