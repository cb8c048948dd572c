"""The goal of a pruning run: β, or a target in a runtime: a speed-up, a latency or bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from selfpruner_hub.errors import BudgetError, UserError
from selfpruner_hub.progress import Progress

if TYPE_CHECKING:  # NumPy takes a tenth of a second, and a mistake on the command line is told at once
    from selfpruner_hub.plans.costs import Costs

QUANTITIES = {"speedup": "ms", "latency": "ms", "memory": "bytes", "kv_cache": "bytes"}
"""Quantities that a target can limit, with the unit of their costs."""
BYTE_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
RUNTIME, REQUEST = "torch", (128, 32)
"""Default runtime of a target, and default request: tokens of the prompt and of the answer."""
TARGET_REMEDY = "Give one of speedup=1.5, latency=MS, memory=200MB and kv_cache=0.5."


@dataclass(frozen=True)
class Target:
    """A speed-up, latency or size that the pruned model must reach in a runtime."""

    quantity: str
    """A key of `QUANTITIES`."""
    value: float
    """Factor above 1 for `speedup`, milliseconds of a request for `latency`. For `memory`, the bytes of the files of
    weights; for `kv_cache`, the bytes of a token. Below 1, both are shares of what the dense model needs."""
    runtime: str
    """Name of the runtime."""
    prompt: int = REQUEST[0]
    """Tokens of the prompt of a request, one at a time."""
    new_tokens: int = REQUEST[1]
    """Tokens that are generated after it."""

    @property
    def unit(self) -> str:
        """Unit of the costs: `ms` or `bytes`."""
        return QUANTITIES[self.quantity]

    @property
    def name(self) -> str:
        """The target as the command line writes it."""
        return f"{self.quantity}={self.value:.15g}"

    @property
    def charged(self) -> str:
        """The cost that counts, in words."""
        return {
            "ms": f"the time of a request of {self.prompt} + {self.new_tokens} tokens in {self.runtime}",
            "bytes": f"the bytes of {'the KV cache' if self.quantity == 'kv_cache' else 'the weights'} in "
            f"{self.runtime}",
        }[self.unit]

    def wanted(self, costs: Costs) -> float:
        """Cost of a model that just reaches the target."""
        if self.quantity == "speedup":
            return costs.dense / self.value
        relative = self.unit == "bytes" and self.value < 1
        return self.value * costs.dense if relative else self.value

    def share(self, costs: Costs) -> float:
        """Share of the prunable cost that the target asks to remove; outside of [0, 1) where no plan reaches it."""
        if not costs.prunable > 0:
            raise BudgetError(
                f"In {self.runtime}, narrower layers were not measured to save anything of {self.charged}.",
                "Give beta, or another target.",
            )
        return (costs.dense - self.wanted(costs)) / costs.prunable

    def figure(self, cost: float, dense: float) -> float:
        """Return the figure that a model of this cost reaches, in the terms of the target."""
        if self.quantity == "speedup":
            return dense / cost
        return cost / dense if self.unit == "bytes" and self.value < 1 else cost

    def said(self, figure: float) -> str:
        """Write a figure, with its unit."""
        if self.quantity == "speedup" or (self.unit == "bytes" and self.value < 1):
            return f"{figure:.3f}"
        return self.said_cost(figure)

    def said_share(self, share: float, costs: Costs) -> str:
        """Write the figure of a plan that removes this share of the prunable cost."""
        return self.said(self.figure(costs.dense - share * costs.prunable, costs.dense))

    def said_cost(self, cost: float) -> str:
        """Write a cost, with its unit."""
        return f"{cost:.2f} ms" if self.unit == "ms" else f"{cost:,.0f} bytes"

    def record(self) -> dict[str, Any]:
        """All fields, JSON-serialisable."""
        return asdict(self)


class Meter(Protocol):
    """A runtime in which costs are measured."""

    name: str

    def costs(self, model: Any, tokenizer: Any, target: Target, progress: Progress, /) -> Costs:
        """Measure the cost of each width of each part, or read the table of an earlier measurement."""
        ...

    def measure(
        self, dense: Any, pruned: Any, tokenizer: Any, target: Target, progress: Progress, /
    ) -> tuple[float, float]:
        """Measure the costs of the dense and of the pruned model, in turn."""
        ...


def check_beta(beta: object) -> float:
    """Return β; raise `BudgetError` unless it is a number with 0 < β < 1."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise BudgetError(f"beta must be a number between 0 and 1; got {beta!r}.", "Pass for example beta=0.3.")
    if not 0 < beta < 1:
        raise BudgetError(
            f"beta must satisfy 0 < beta < 1; got {beta:g}.", "It is the mean fraction of weights removed."
        )
    return beta


def needs_target(runtime: object, request: object) -> None:
    """Raise `UserError` if a runtime or a request is given without a target."""
    if runtime is not None or request is not None:
        raise UserError("runtime and request say how a target is measured, and none is given.", TARGET_REMEDY)


def target_of(goal: Mapping[str, Any], runtime: str | None, request: tuple[int, int] | None = None) -> Target:
    """Check a target.

    Args:
        goal: One quantity and its value: a number, or for bytes also text such as `"200MB"`.
        runtime: Name of the runtime; None takes `RUNTIME`.
        request: Tokens of the prompt, and tokens generated after it, each at least 1; None takes `REQUEST`.

    Returns:
        The target.

    Raises:
        UserError: It is not one quantity, or a value is out of its range.
    """
    if not isinstance(goal, Mapping) or len(goal) != 1 or not set(goal) <= set(QUANTITIES):
        raise UserError(f"A target is one quantity and its value; got {goal!r}.", TARGET_REMEDY)
    ((quantity, amount),) = goal.items()
    value = _value(amount, quantity)
    if quantity == "speedup" and value <= 1:
        raise UserError(f"A target's speedup must be above 1; got {value:g}.", TARGET_REMEDY)
    if value == 1 and QUANTITIES[quantity] == "bytes":
        raise UserError(f"{quantity}=1 is neither a share below 1 nor a number of bytes.", TARGET_REMEDY)
    if request is not None and not (isinstance(request, (tuple, list)) and len(request) == 2):
        raise UserError(f"A request is two numbers of tokens, such as (128, 32); got {request!r}.", TARGET_REMEDY)
    prompt, new_tokens = REQUEST if request is None else request
    for name, count in (("prompt", prompt), ("new_tokens", new_tokens)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"{name} must be a whole number from 1 on; got {count!r}.")
    return Target(quantity, value, RUNTIME if runtime is None else runtime, prompt, new_tokens)


def parse_target(text: str) -> dict[str, str]:
    """Read a target from the command line, NAME=VALUE, for `target_of`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"A target is NAME=VALUE; got {text!r}.", TARGET_REMEDY)
    return {name.strip(): value.strip()}


def _value(amount: Any, quantity: str) -> float:
    """Return the positive number that a value stands for; bytes may have a unit."""
    match = re.fullmatch(r"([0-9.eE+-]+?)\s*([kmg]?i?b)?", str(amount).strip(), re.IGNORECASE)
    try:
        number = math.nan if match is None or isinstance(amount, bool) else float(match[1])
    except ValueError:
        number = math.nan
    unit = (match[2] or "").lower() if match else ""
    if not 0 < number < math.inf or (unit and QUANTITIES[quantity] != "bytes") or unit not in BYTE_UNITS:
        raise UserError(f"{quantity} must be a number above 0; got {amount!r}.", TARGET_REMEDY)
    return number * BYTE_UNITS[unit]
