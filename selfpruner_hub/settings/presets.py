"""The presets, and settings from a preset and changes: checked, with errors in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from selfpruner_hub.errors import UserError
from selfpruner_hub.settings.fields import DescribedSetting, Rules, described_fields, with_changes
from selfpruner_hub.settings.prune import EndpointOptions, LanguageModelOptions, PruneSettings, SearchSchedule

FOLLOWING = ("fisher_tokens", "fitness_tokens")
"""Settings that keep the preset's proportion to `calibration_tokens` unless they are given."""
TEXT_SIZES = ("calibration_tokens", *FOLLOWING)
"""Numbers of tokens of each text."""
SEARCH = 10
"""Length of the search where a proposer is given and no length, in evaluations on the whole fitness text."""
PRESETS = {
    "default": PruneSettings(),
    "draft": PruneSettings(
        importance="energy",
        repair="output",  # the second repair needs more text: docs/results.md
        calibration_tokens=4_096,
        shares=1.0,  # of little text, fewer conversations cost more than they bring: docs/data.md
        fisher_tokens=1_024,
        fitness_tokens=2_048,
        seeds=("sensitivity",),
    ),
    "best": PruneSettings(calibration_tokens=131_072, fisher_tokens=16_384),
    # arXiv 2502.14413: population 30, 20 iterations of 10 crossover and 10 mutation children, rates in 0.1 to 0.9,
    # one rate a layer, Wanda-sp, no repair, perplexity.
    "paper": PruneSettings(
        importance="wanda-sp",
        repair="none",
        confidence=False,
        fitness="perplexity",
        tied=True,
        multiple_of=1,
        p_min=0.1,
        seeds=("uniform",),
        calibration_tokens=32_768,  # norms of the inputs are all that it needs
        fitness_tokens=2_048,  # 430 evaluations, each on all of them
        schedule=SearchSchedule(
            evaluations=430, patience=0, population=30, crossover=10, mutation=10, first_share=1.0, probe_share=0.0
        ),
    ),
}

CHOICES = {
    "importance": ("obs", "wanda-sp", "flap", "energy", "reap-sum", "reap", "frequency"),
    "repair": ("none", "output", "sequential", "full"),
    "fitness": ("kl", "perplexity"),
    "seeds": ("uniform", "ramp", "sensitivity", "blend", "refined"),
}
"""Known names, checked before a model is loaded; a test holds them to the modules that define them."""
_PRUNE_RULES = Rules(
    ranges={
        "window": (2, 1 << 20),
        "fewest_experts": (0, 1 << 20),
        **dict.fromkeys(TEXT_SIZES, (1, 1 << 40)),
        "shares": (1e-6, 1e6),
    },
    choices=CHOICES,
    parts={
        "schedule": Rules(
            ranges={
                **dict.fromkeys(("evaluations", "patience", "population", "crossover", "mutation"), (0, 1e9)),
                "first_share": (1e-6, 1),
                "survivors": (0, 1),
                "probe_share": (0, 1),
            },
            prefix="schedule.",
        )
    },
)
_OPTION_RULES = Rules(
    ranges={"temperature": (1e-3, 100), "request_limit": (0, 1e9), "token_limit": (0, 1e12), "token_price": (0, 1e6)},
    what="proposer option",
)


def explained(preset: str = "default") -> list[DescribedSetting]:
    """List all settings of `prune`.

    Args:
        preset: A key of `PRESETS`, whose values are given as defaults.

    Returns:
        The settings, in the order of the fields; those of the schedule as `schedule.NAME`.

    Raises:
        UserError: The preset is unknown.
    """
    return described_fields(PruneSettings, _of_preset(preset).record())


def _of_preset(preset: str) -> PruneSettings:
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}.", f"Choose one of: {', '.join(PRESETS)}.")
    return PRESETS[preset]


def resolve(preset: str | None, *, evaluations: float | None = None, **changes: Any) -> PruneSettings:
    """Take a preset and change some of its settings.

    Args:
        preset: A key of `PRESETS`; None takes the default.
        evaluations: Length of the search, `schedule.evaluations`.
        **changes: Fields of `PruneSettings`; those that are None are left alone. `schedule` is a `SearchSchedule`, or a
            mapping that changes some fields of the preset's.

    Returns:
        The checked settings. `FOLLOWING` keep their proportion to `calibration_tokens` unless given.

    Raises:
        UserError: The preset or a setting is unknown, or a value is out of its range.
    """
    base = _of_preset("default" if preset is None else preset)
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = with_changes(base, changes, _PRUNE_RULES)
    if evaluations is not None:
        given = changes.get("schedule", {})
        if (given.get("evaluations") if isinstance(given, Mapping) else given.evaluations) is not None:
            raise UserError("evaluations and schedule.evaluations are both given.", "Leave out one of them.")
        settings = with_changes(settings, {"schedule": {"evaluations": evaluations}}, _PRUNE_RULES)
    schedule = settings.schedule
    if schedule.evaluations != 0 and not schedule.crossover + schedule.mutation:
        raise UserError("A search needs crossover or mutation children.", "Set one above 0, or evaluations to 0.")
    size = settings.calibration_tokens
    followed = {
        name: max(1, getattr(base, name) * size // base.calibration_tokens) for name in FOLLOWING if name not in changes
    }
    return replace(settings, **followed)


def proposer_options(proposer: object, options: Mapping[str, Any] | None) -> LanguageModelOptions:
    """Check the options of a language model that proposes.

    Args:
        proposer: Proposer, as for `AutoPruner.prune`; a URL stands for an endpoint.
        options: Values by name; None takes the defaults.

    Returns:
        The options: `EndpointOptions` for an endpoint.

    Raises:
        UserError: An option is unknown, or a value is out of its range.
    """
    if not isinstance(options, Mapping | None):
        raise UserError(f"proposer_options must be a mapping of names to values; got {options!r}.")
    kind = EndpointOptions if isinstance(proposer, str) and "://" in proposer else LanguageModelOptions
    return with_changes(kind(), options or {}, _OPTION_RULES)


def check_minutes(minutes: Any, recover: Any) -> None:
    """Refuse what is no length of a run or of its recovery.

    Args:
        minutes: Minutes that a run may take, above 0; None if they are not limited.
        recover: Minutes of recovery among them, at least 0; None if they are not given.

    Raises:
        UserError: It is not such a number, or recovery takes all minutes.
    """
    for name, value, least in (("minutes", minutes, "above"), ("recover", recover, "of at least")):
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        if value is not None and not (number and (0 < value < math.inf or (value == 0 and least != "above"))):
            raise UserError(f"{name} must be a number {least} 0; got {value!r}.")
    if minutes is not None and recover is not None and recover >= minutes:
        raise UserError(f"Of {minutes:g} minutes, {recover:g} for recovery leave none for pruning.", "Give more.")


def check_seed(seed: Any) -> None:
    """Raise `UserError` unless a random seed is a whole number from 0 to 2³¹ - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise UserError(f"seed must be a whole number from 0 to {2**31 - 1}; got {seed!r}.")
