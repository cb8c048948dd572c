"""Settings of pruning: what they are, the presets, and how they are checked."""

from selfpruner_hub.settings.fields import DescribedSetting, described_fields
from selfpruner_hub.settings.presets import (
    CHOICES,
    PRESETS,
    SEARCH,
    TEXT_SIZES,
    check_minutes,
    check_seed,
    explained,
    proposer_options,
    resolve,
)
from selfpruner_hub.settings.prune import EndpointOptions, LanguageModelOptions, PruneSettings, SearchSchedule

__all__ = [
    "CHOICES",
    "PRESETS",
    "SEARCH",
    "TEXT_SIZES",
    "EndpointOptions",
    "LanguageModelOptions",
    "PruneSettings",
    "SearchSchedule",
    "DescribedSetting",
    "check_minutes",
    "check_seed",
    "described_fields",
    "explained",
    "proposer_options",
    "resolve",
]
