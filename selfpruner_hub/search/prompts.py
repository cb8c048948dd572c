"""What a language model is asked, the schema it answers in, and how its answer is read: pure functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from selfpruner_hub.budget import Budget, Rates
from selfpruner_hub.errors import ProposerError, UserError
from selfpruner_hub.search.proposers import Operation, Proposal, Scored

SHOWN = 5
"""Earlier solutions in a prompt, worst to best (the last is the best)."""
PARENTS: dict[Operation, int] = {"initial": 0, "crossover": 2, "mutation": 1}
"""Parents that the reply must name."""


def template(operation: Operation, templates: Path | None = None) -> str:
    """Read the prompt template of an operation.

    Args:
        operation: Which one.
        templates: Directory with `initial.txt`, `crossover.txt` and `mutation.txt`; None uses the built-in ones.

    Returns:
        Its text, with `$placeholders`.

    Raises:
        UserError: It cannot be read.
    """
    source = (resources.files(__package__) / "templates") if templates is None else templates
    try:
        return (source / f"{operation}.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompt template {operation}.txt cannot be used: {error}.") from error


def shown(history: Sequence[Scored]) -> list[Scored]:
    """The solutions that a prompt shows, out of a history with the best first: worst to best."""
    return list(reversed(history[:SHOWN]))


def render(
    operation: Operation, history: Sequence[Scored], budget: Budget, model: str, templates: Path | None = None
) -> str:
    """Fill the template of an operation.

    Args:
        operation: Which template.
        history: Scored plans, best first.
        budget: Gives β, bounds and geometry.
        model: Name of the model that is being pruned.
        templates: As for `template`.

    Returns:
        The prompt.

    Raises:
        UserError: A template cannot be read or has an unknown placeholder.
    """
    shape, dense = budget.shape, budget.shape.dense.layers[0]
    values = {
        "model": model,
        "layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "heads": dense.num_key_value_heads * shape.queries_per_group,
        "groups": dense.num_key_value_heads,
        "channels": dense.intermediate_size,
        "beta": f"{100 * budget.beta:g}",
        "p_max": round(100 * budget.p_max),
        "parts": "" if budget.tied else ', for attention ("attention") and feed-forward ("ffn")',
        "history": "\n".join(
            f"{number}. loss {s.fitness:.4f}: {solution(budget, s.rates)}" for number, s in enumerate(shown(history), 1)
        )
        or "(none)",
    }
    try:
        return Template(template(operation, templates)).substitute(values)
    except (KeyError, ValueError) as error:
        raise UserError(f"The prompt template {operation}.txt cannot be used: {error}.") from error


def solution(budget: Budget, rates: Rates) -> str:
    """Rates as they stand in prompts and replies: whole percentages, compact JSON."""
    lists = {"rates": rates.ffn} if budget.tied else {"attention": rates.attention, "ffn": rates.ffn}
    return json.dumps({k: [round(100 * r) for r in v] for k, v in lists.items()}, separators=(",", ":"))


def schema(operation: Operation, history: Sequence[Scored], budget: Budget) -> dict[str, Any]:
    """JSON schema of a reply: the parents' numbers, then one whole percentage per layer and part."""
    percent = {"type": "integer", "minimum": 0, "maximum": round(100 * budget.p_max)}
    properties: dict[str, Any] = {}
    if PARENTS[operation] and history:
        number = {"type": "integer", "minimum": 1, "maximum": len(shown(history))}
        properties["parents"] = _list(number, PARENTS[operation])
    layers = budget.shape.num_layers
    if budget.tied:
        properties["rates"] = _list(percent, layers)
    else:
        groups = budget.shape.dense.layers[0].num_key_value_heads
        steps = sorted({round(100 * g / groups) for g in range(groups)})
        steps = [s for s in steps if s <= round(100 * budget.p_max)]
        properties["attention"] = _list({"enum": steps} if len(steps) <= 8 else percent, layers)
        properties["ffn"] = _list(percent, layers)
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any], length: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


def parse(reply: str, budget: Budget) -> tuple[Rates, tuple[int, ...]]:
    """Read a reply, which is never trusted: it may be prose, truncated, or of any shape.

    Args:
        reply: What the language model wrote.
        budget: Says how many rates there must be.

    Returns:
        The proposed rates in [0, 1], and the 1-based numbers of the parents it named (those that are integers).

    Raises:
        ProposerError: It is not an object with the right lists of finite percentages.
    """
    try:
        value = json.loads(reply[: reply.rindex("}") + 1][reply.index("{") :])
    except (ValueError, RecursionError) as error:
        raise ProposerError("The reply is not a JSON object.") from error
    names = ("rates",) if budget.tied else ("attention", "ffn")
    lists = [_percentages(value, name, budget.shape.num_layers) for name in names]
    parents = value.get("parents")
    numbers = [p for p in parents if type(p) is int] if isinstance(parents, list) else []
    return Rates(lists[0], lists[-1]), tuple(numbers[:2])


def proposal(prompt: str, reply: str, budget: Budget, seen: int, tokens: int) -> Proposal:
    """Turn a reply into a proposal, or into a refusal that says what is wrong with it.

    Args:
        prompt: What was asked.
        reply: What the language model wrote.
        budget: Says how many rates there must be.
        seen: Length of the history behind the prompt.
        tokens: Tokens read and written for this reply.

    Returns:
        A proposal whose parents are indices into the history.
    """
    try:
        rates, numbers = parse(reply, budget)
    except ProposerError as error:
        return Proposal(None, prompt=prompt, reply=reply, error=str(error), tokens=tokens)
    listed = min(seen, SHOWN)
    parents = tuple(listed - n for n in numbers if 1 <= n <= listed)  # number 1 is the worst that was shown
    return Proposal(rates, parents, prompt, reply, tokens=tokens)


def _percentages(value: Any, name: str, length: int) -> tuple[float, ...]:
    numbers = value.get(name) if isinstance(value, dict) else None
    if not isinstance(numbers, list) or len(numbers) != length:
        raise ProposerError(f"The reply has no list of {length} numbers under {name!r}.")
    if not all(type(n) in (int, float) and 0 <= n <= 100 for n in numbers):
        raise ProposerError(f"The reply's {name!r} are not percentages.")
    return tuple(n / 100 for n in numbers)
