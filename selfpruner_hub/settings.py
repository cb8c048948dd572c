"""Settings of the method, and the named sets of them."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from selfpruner_hub.errors import UserError


@dataclass(frozen=True)
class PruneSettings:
    """Every setting of `prune` that is not about where things come from; all of them go into the record."""

    importance: str = "obs"
    """Order in which FFN channels and KV groups are removed: obs, wanda-sp, flap or energy."""
    repair: bool = True
    """Refit o_proj and down_proj by least squares after the cut (the first repair)."""
    sequential_repair: bool = True
    """Refit them again, layer by layer, on the activations of the pruned model (the second repair). Needs `repair`."""
    repair_gate_up: bool = True
    """Let the second repair change gate_proj and up_proj as well."""
    confidence: bool = True
    """Scale all logits by one factor, so that the pruned model is as confident as its parent on the fitness text."""
    fitness: str = "kl"
    """What the search minimises: kl (divergence from the dense model) or perplexity."""
    tied: bool = False
    """Give attention and FFN of a layer one common rate."""
    p_min: float = 0.0
    """Smallest rate of a layer, in [0, β]."""
    p_max: float = 0.9
    """Largest rate of the attention or the FFN of a layer, in [β, 1)."""
    multiple_of: int = 0
    """FFN widths are multiples of this number, which must divide the dense width. 0 chooses the largest of 128, 64, 32,
    16 and 8 that leaves at least 48 widths, else 1: GPUs and quantised weights want such multiples."""
    kv_multiple: int = 1
    """KV heads of every layer are a multiple of this number, such as the size of tensor parallelism. It must divide the
    dense number."""
    uniform: bool = False
    """Give the FFNs of all layers one width, and keep all attention: the result is a stock model."""
    window: int = 512
    """Tokens of a window of calibration and fitness text."""
    calibration_tokens: int = 73_728
    """Tokens of the calibration text, to which both repairs are fitted."""
    shares: tuple[float, ...] = ()
    """Shares of the sources of `data`, in their order; they need not sum to 1. Empty: `written_share` for one that the
    model writes, 1 for one that is read."""
    written_share: float = 0.5
    """Share of a source that the model writes (`chat`, `self`), where `shares` is empty."""
    fisher_tokens: int = 8_192
    """Calibration tokens of the one backward pass that measures the Fisher information of the layers' outputs."""
    fitness_tokens: int = 16_384
    """Tokens of the fitness text, on which the search selects plans. It is disjoint from the calibration text."""
    seeds: tuple[str, ...] = ("uniform", "ramp", "sensitivity", "refined")
    """Plans that the search starts from: uniform rates, a ramp over depth, a knapsack over predicted losses
    (sensitivity), the same after a step along measured effects (refined), and its mean with uniform rates (blend)."""
    evaluations: float = 0
    """Greatest length of the search, in evaluations on the whole fitness text; 0 takes the best seed. By default
    nothing is searched: 10 evaluations gained 0.2 % or less on unseen text at β = 0.2, 0.3 and 0.5."""
    patience: int = 2
    """Rounds in a row without a gain on unseen text, after which the search ends; 0 spends all evaluations."""
    population: int = 0
    """New plans in the first round of the search."""
    crossover: int = 8
    """Children of two plans in each later round."""
    mutation: int = 8
    """Changes of one plan in each later round."""
    first_share: float = 0.25
    """Share of the fitness windows on which every candidate is scored first."""
    survivors: float = 0.125
    """Share of a round's candidates that is scored on all fitness windows."""
    probe_share: float = 0.25
    """Share of the fitness windows on which small changes of the best plan are measured, for a language model that
    proposes; 0 measures none."""
    temperature: float = 1.0
    """Sampling temperature of a language model that proposes."""
    templates: str = ""
    """Directory with `initial.txt`, `crossover.txt` and `mutation.txt` in place of the built-in prompts."""
    request_limit: int = 2_000
    """Largest number of requests to an endpoint, retries included."""
    token_limit: int = 5_000_000
    """Largest number of tokens that an endpoint reads and writes."""
    token_price: float = 0.0
    """Price of a million tokens at the endpoint, in dollars, for the progress line; 0 shows none."""

    def record(self) -> dict[str, Any]:
        """All settings, JSON-serialisable; not the place of the prompts, which is this machine's business."""
        values = {**asdict(self), "seeds": list(self.seeds), "shares": list(self.shares)}
        del values["templates"]
        return values

    @property
    def predicts_losses(self) -> bool:
        """Whether one of the seeds is made from predicted losses."""
        return bool({"sensitivity", "refined", "blend"} & set(self.seeds))

    @property
    def repairs_twice(self) -> bool:
        """Whether a second repair follows the first."""
        return self.repair and self.sequential_repair

    @property
    def weighs_excess(self) -> bool:
        """Whether plans are scored by `SecondRepairScore`, as a second repair takes part of the excess away.

        One that leaves gate and up as they are takes too little of it: weighed so, plans lost too much attention, and
        were worse on articles, conversations and code.
        """
        return self.repairs_twice and self.repair_gate_up

    @property
    def template_directory(self) -> Path | None:
        """Where the prompts are; None for the built-in ones."""
        return Path(self.templates) if self.templates else None


TEXT_SIZES = ("calibration_tokens", "fisher_tokens", "fitness_tokens")
"""Settings that follow from the minutes of a run, where these are given."""
SEARCH = 10
"""Length of the search where a proposer is given and no length, in evaluations on the whole fitness text."""
PRESETS = {
    "default": PruneSettings(),
    "draft": PruneSettings(
        importance="energy",
        sequential_repair=False,  # it needs more text: docs/results.md
        calibration_tokens=4_096,
        written_share=1.0,  # of little text, fewer conversations cost more than they bring: docs/data.md
        fisher_tokens=1_024,
        fitness_tokens=2_048,
        seeds=("sensitivity",),
    ),
    "fast": PruneSettings(
        calibration_tokens=10_240,
        written_share=1.0,
        fisher_tokens=2_048,
        fitness_tokens=4_096,
        seeds=("sensitivity",),
    ),
    "best": PruneSettings(calibration_tokens=131_072, fisher_tokens=16_384),
    # arXiv 2502.14413: population 30, 20 iterations of 10 crossover and 10 mutation children, rates in 0.1 to 0.9,
    # one rate a layer, Wanda-sp, no repair, perplexity.
    "paper": PruneSettings(
        importance="wanda-sp",
        repair=False,
        confidence=False,
        fitness="perplexity",
        tied=True,
        multiple_of=1,
        p_min=0.1,
        seeds=("uniform",),
        calibration_tokens=32_768,  # norms of the inputs are all that it needs
        fitness_tokens=2_048,  # 430 evaluations, each on all of them
        evaluations=430,
        patience=0,
        population=30,
        crossover=10,
        mutation=10,
        first_share=1.0,
        probe_share=0.0,
    ),
}


_KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "a name"),
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "tuple[str, ...]": ((list, tuple), "a list of names"),
    "tuple[float, ...]": ((list, tuple), "a list of numbers"),
}
"""By the annotation of a field: the types of its values, and their name in errors."""
CHOICES = {
    "importance": ("obs", "wanda-sp", "flap", "energy"),
    "fitness": ("kl", "perplexity"),
    "seeds": ("uniform", "ramp", "sensitivity", "blend", "refined"),
}
"""Known names, checked before a model is loaded; a test holds them to the modules that define them."""


@dataclass(frozen=True)
class Setting:
    """A field of a dataclass of settings, as users are told of it."""

    name: str
    kind: str
    """What its values are, such as `a whole number`."""
    default: Any
    """JSON value."""
    meaning: str
    """Its docstring, in one line."""


def explained(preset: str = "default") -> list[Setting]:
    """List all settings of `prune`.

    Args:
        preset: A key of `PRESETS`, whose values are given as defaults.

    Returns:
        The settings, in the order of the fields.

    Raises:
        UserError: The preset is unknown.
    """
    method = _of_preset(preset)
    return described(PruneSettings, {**method.record(), "templates": method.templates})


def described(cls: type, values: Mapping[str, Any] | None = None) -> list[Setting]:
    """List the fields of a dataclass of settings with their meaning, which is read from its source.

    Args:
        cls: Dataclass; each field has a docstring and a default.
        values: JSON values by name, given as defaults; None takes those of the fields.

    Returns:
        The settings, in the order of the fields.
    """
    (defined,) = ast.parse(inspect.getsource(cls)).body
    meanings = {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for field, text in pairwise(getattr(defined, "body", []))
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    given = {f.name: f.default for f in fields(cls)} if values is None else values
    return [Setting(f.name, _KINDS[str(f.type)][1], given[f.name], meanings.get(f.name, "")) for f in fields(cls)]


def _of_preset(preset: str) -> PruneSettings:
    if preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}.", f"Choose one of: {', '.join(PRESETS)}.")
    return PRESETS[preset]


def resolve(preset: str | None, **changes: Any) -> PruneSettings:
    """Take a preset and change some of its settings.

    Args:
        preset: A key of `PRESETS`; None takes the default.
        **changes: Fields of `PruneSettings`; those that are None are left alone.

    Returns:
        The checked settings.

    Raises:
        UserError: The preset or a setting is unknown, or a value is out of its range.
    """
    base = _of_preset("default" if preset is None else preset)
    changes = {key: value for key, value in changes.items() if value is not None}
    if unknown := set(changes) - {f.name for f in fields(PruneSettings)}:
        raise UserError(
            f"Unknown setting {', '.join(sorted(unknown))}.",
            f"Known: {', '.join(f.name for f in fields(PruneSettings))}.",
        )
    method = replace(base, **changes)
    _check_kinds(method)
    for name, low, high in (
        ("evaluations", 0, 1e9),
        ("patience", 0, 1e9),
        ("window", 2, 1 << 20),
        ("calibration_tokens", 1, 1 << 40),
        ("fisher_tokens", 1, 1 << 40),
        ("fitness_tokens", 1, 1 << 40),
        ("written_share", 1e-6, 1e6),
        ("first_share", 1e-6, 1),
        ("probe_share", 0, 1),
        ("survivors", 0, 1),
        ("temperature", 1e-3, 100),
        ("request_limit", 0, 1e9),
        ("token_limit", 0, 1e12),
        ("token_price", 0, 1e6),
    ):
        value = getattr(method, name)
        if not low <= value <= high:
            raise UserError(f"{name} must be a number from {low:g} to {high:g}; got {value!r}.")
    if not all(isinstance(share, (int, float)) and 0 < share < math.inf for share in method.shares):
        raise UserError(f"shares must be numbers above 0; got {list(method.shares)!r}.")
    if min(method.population, method.crossover, method.mutation) < 0:
        raise UserError("population, crossover and mutation must not be negative.")
    if method.evaluations and not method.crossover + method.mutation:
        raise UserError("A search needs crossover or mutation children.", "Set one of them above 0.")
    return method


def check_minutes(minutes: Any, recover: Any, given: Collection[str]) -> None:
    """Refuse what is no length of a run or of its recovery, and settings that the length decides.

    Args:
        minutes: Minutes that a run may take, above 0; None if they are not limited.
        recover: Minutes of recovery, at least 0; None if they are not given.
        given: Names of the settings that the user has changed.

    Raises:
        UserError: It is not such a number, or such a setting is given as well.
    """
    decided = [name for name in TEXT_SIZES if name in given]
    if minutes is not None and decided:
        raise UserError(f"minutes decides {decided[0]}, and both are given.", "Leave out one of them.")
    for name, value, least in (("minutes", minutes, "above"), ("recover", recover, "of at least")):
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        if value is not None and not (number and (value > 0 or (value == 0 and least != "above"))):
            raise UserError(f"{name} must be a number {least} 0; got {value!r}.")


def check_seed(seed: Any) -> None:
    """Raise `UserError` unless a random seed is a whole number from 0 to 2³¹ - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise UserError(f"seed must be a whole number from 0 to {2**31 - 1}; got {seed!r}.")


def _check_kinds(method: PruneSettings) -> None:
    for f in fields(PruneSettings):
        value = getattr(method, f.name)
        types, called = _KINDS[str(f.type)]
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise UserError(f"{f.name} must be {called}; got {value!r}.")
    for name, known in CHOICES.items():
        value = getattr(method, name)
        names = [value] if isinstance(value, str) else list(value)
        if not names or not set(map(str, names)) <= set(known):
            raise UserError(f"Unknown {name} {value!r}.", f"Choose from: {', '.join(known)}.")
