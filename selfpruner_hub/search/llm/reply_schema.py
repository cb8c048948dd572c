"""Replies of a language model: their JSON schema, and a parser that trusts nothing in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from selfpruner_hub.errors import ProposerError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.search.llm.prompts import percent
from selfpruner_hub.search.llm.question import LISTED, Question
from selfpruner_hub.search.proposers import Operation, Proposal

PARENTS: dict[Operation, int] = {"initial": 0, "crossover": 2, "mutation": 1}
"""Number of parents that the reply must name."""
CHANGES = {"rates": (1, 4), "ffn": (1, 4), "attention": (0, 2)}
"""Minimum and maximum number of layers that lose more, and of those that lose less, in a mutation, by part, where no
effects were measured."""
MOST_POINTS = 15
"""Maximum change of a rate in a mutation, in percentage points; attention changes by `kv_multiple` KV groups."""


def schema(question: Question, *, narrow: bool = False) -> dict[str, Any]:
    """JSON schema of a reply.

    Args:
        question: Question: `initial` and `crossover` ask for one whole percentage per layer and part, `mutation` for
            lists of layers that lose more and that lose less. Replies to all but `initial` name their parents first.
        narrow: Whether to restrict the replies of small models: parents to the better half (for a mutation, to the
            measured one), each value of a crossover child to the range of the solutions shown, and each place in the
            lists of a mutation to 0 or one layer whose change lowers the loss. This needs a schema per position, which
            not every server supports.

    Returns:
        The schema, an object without other properties.
    """
    properties: dict[str, Any] = {}
    operation, budget = question.operation, question.budget
    if PARENTS[operation] and question.history:
        listed, measured = len(question.shown), question.measured
        number: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": -(-listed // 2) if narrow else listed}
        if narrow and operation == "mutation" and measured:
            number = {"enum": [measured]}
        properties["parents"] = _list(number, PARENTS[operation], PARENTS[operation])
    if operation == "mutation" and question.history:
        return _object(properties | _changes(question, narrow))
    layers = budget.shape.num_layers
    for part, rule in _parts(budget).items():
        properties[part] = _list(rule, layers, layers)
        if narrow and operation == "crossover" and question.history:
            columns = zip(*(percent(budget, s.rates)[part] for s in question.shown), strict=True)
            places = [{"type": "integer", "minimum": min(v), "maximum": max(v)} for v in columns]
            if "enum" in rule:
                places = [
                    {"enum": [s for s in rule["enum"] if p["minimum"] <= s <= p["maximum"]] or rule["enum"][:1]}
                    for p in places
                ]
            properties[part] = {**_list(rule, layers, layers), "prefixItems": places}
            del properties[part]["items"]
    return _object(properties)


def _parts(budget: Budget) -> dict[str, dict[str, Any]]:
    """Return the schema of the values in each list of a whole solution."""
    most = round(100 * budget.p_max)
    percent = {"type": "integer", "minimum": 0, "maximum": most}
    if budget.tied:
        return {"rates": percent}
    steps = [step for step in _steps(budget) if step <= most]
    return {"attention": {"enum": steps} if len(steps) <= 8 else percent, "ffn": percent}


def _steps(budget: Budget) -> list[int]:
    """Return the attention rates that steps of `kv_multiple` KV groups allow, in percent."""
    groups = budget.shape.dense.layers[0].num_key_value_heads
    if budget.shape.whole_attention:
        return [0]
    return sorted({round(100 * g / groups) for g in range(0, groups, budget.kv_multiple)})


def _changes(question: Question, narrow: bool) -> dict[str, dict[str, Any]]:
    """Return the schema of a mutation, by part; a narrow one allows each layer that lowers the loss, or 0."""
    layer: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": question.budget.shape.num_layers}
    offered = question.promising
    rules = {}
    for part in question.parts:
        least, most = (0, LISTED) if offered else CHANGES[part]
        directions = {}
        for way in ("more", "less"):
            directions[way] = _list(layer, least, most)
            if narrow and offered:
                places = [{"enum": [number, 0]} for number in offered[part, way]]
                directions[way] = {**_list(layer, len(places), len(places)), "prefixItems": places}
                del directions[way]["items"]
        points = {} if part == "attention" else {"points": {"type": "integer", "minimum": 1, "maximum": MOST_POINTS}}
        rules[part] = _object({**directions, **points})
    return rules


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def example(rule: Mapping[str, Any]) -> Any:
    """Make a long value that fits one of our schemas; the token limit of a reply is computed from it."""
    if "properties" in rule:
        return {name: example(inner) for name, inner in rule["properties"].items()}
    if rule.get("type") == "array":
        places = rule["prefixItems"] if "prefixItems" in rule else [rule["items"]] * rule["maxItems"]
        return [example(place) for place in places]
    return max(rule["enum"]) if "enum" in rule else rule["maximum"]


def parse(question: Question, reply: str) -> tuple[Rates, tuple[int, ...]]:
    """Read an untrusted reply: it may be prose, truncated, or of any shape.

    Args:
        question: Question that was asked; changes apply to the parent that the reply names.
        reply: Text that the language model wrote.

    Returns:
        The proposed rates in [0, 1], and the indices into the history of the parents it named.

    Raises:
        ProposerError: The reply is not an object with the right lists of finite percentages, or changes no known
            parent.
    """
    try:
        value = json.loads(reply[: reply.rindex("}") + 1][reply.index("{") :])
    except (ValueError, RecursionError) as error:
        raise ProposerError("The reply is not a JSON object.") from error
    if not isinstance(value, dict):
        raise ProposerError("The reply is not a JSON object.")
    budget, shown = question.budget, question.shown
    references = value.get("parents")
    numbers = [n for n in references if type(n) is int and 1 <= n <= len(shown)] if isinstance(references, list) else []
    parents = tuple(question.history.index(shown[n - 1]) for n in numbers[:2])
    if question.operation == "mutation" and any(isinstance(value.get(part), dict) for part in question.parts):
        if not parents:
            raise ProposerError(f"The reply names no parent from 1 to {len(shown)}.")
        return _changed(question.history[parents[0]].rates, value, budget), parents
    lists = [_percentages(value, name, budget.shape.num_layers) for name in question.parts]
    return Rates(lists[0], lists[-1]), parents


def _changed(parent: Rates, value: dict[str, Any], budget: Budget) -> Rates:
    """Return the parent's rates with less removed from some layers and more from others, within [0, 1].

    Attention changes by `kv_multiple` KV groups, and an FFN that loses less gets `points` back. The FFNs that
    lose more make up for the cost of what was given back.
    """
    costs, dense = budget.costs, budget.shape.dense.layers
    attention, ffn = [*parent.attention], [*parent.ffn]
    spare = 0.0  # cost still to remove, in place of those given back
    more, less, _ = ([], [], 0.0) if budget.tied else _change(value, "attention", budget)
    for layer, sign in [(n, 1) for n in more] + [(n, -1) for n in less]:
        before, groups = attention[layer], dense[layer].num_key_value_heads
        attention[layer] = min(max(before + sign * budget.kv_multiple / groups, 0.0), 1.0)
        spare -= (attention[layer] - before) * groups * costs.group(layer)
    sizes = [float(f[-1] + a[-1] if budget.tied else f[-1]) for a, f in zip(costs.attention, costs.ffn, strict=True)]
    more, less, points = _change(value, "rates" if budget.tied else "ffn", budget)
    for layer in less:
        before, ffn[layer] = ffn[layer], max(ffn[layer] - points, 0.0)
        spare += (before - ffn[layer]) * sizes[layer]
    charged = sum(sizes[layer] for layer in more)
    step = min(max(spare / charged, 0.0), MOST_POINTS / 100) if charged else 0.0
    for layer in more:
        ffn[layer] = min(ffn[layer] + step, 1.0)
    return Rates.tied(ffn) if budget.tied else Rates(tuple(attention), tuple(ffn))


def _change(value: dict[str, Any], part: str, budget: Budget) -> tuple[list[int], list[int], float]:
    """Read the change of one part: layers (from 0) that lose more, layers that lose less, and the step in [0, 1]."""
    change = value.get(part, {})
    if not isinstance(change, dict):
        raise ProposerError(f"The reply's {part!r} is not an object.")
    points = change.get("points", 0)
    if type(points) not in (int, float) or not 0 <= points <= 100:
        raise ProposerError(f"The change of {part!r} in the reply is not in percentage points.")
    more, less = (_layers(change.get(way, []), budget.shape.num_layers) for way in ("more", "less"))
    return more, [layer for layer in less if layer not in more], points / 100


def _layers(numbers: Any, count: int) -> list[int]:
    """Return the layers counted from 0, each once; a 0 in the reply means no layer."""
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n <= count for n in numbers):
        raise ProposerError(f"The reply does not list layers from 1 to {count}.")
    return [number - 1 for number in dict.fromkeys(numbers) if number]


def proposal(question: Question, prompt: str, reply: str, tokens: int) -> Proposal:
    """Turn a reply into a proposal, or into a refusal that says what is wrong with it.

    Args:
        question: Question that was asked.
        prompt: Prompt that was sent.
        reply: Text that the language model wrote.
        tokens: Number of tokens read and written for this reply.

    Returns:
        A proposal whose parents are indices into the history.
    """
    try:
        rates, parents = parse(question, reply)
    except ProposerError as error:
        return Proposal(None, prompt=prompt, reply=reply, error=str(error), tokens=tokens)
    return Proposal(rates, parents, prompt, reply, tokens=tokens)


def _percentages(value: Any, name: str, length: int) -> tuple[float, ...]:
    numbers = value.get(name) if isinstance(value, dict) else None
    if not isinstance(numbers, list) or len(numbers) != length:
        raise ProposerError(f"The reply has no list of {length} numbers under {name!r}.")
    if not all(type(n) in (int, float) and 0 <= n <= 100 for n in numbers):
        raise ProposerError(f"The reply's {name!r} are not percentages.")
    return tuple(n / 100 for n in numbers)
