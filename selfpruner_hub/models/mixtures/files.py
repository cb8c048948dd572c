"""Tensors per expert in the files of a stock mixture, which its model holds as one tensor of all experts."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from selfpruner_hub.models.mixtures.table import EXPERTS


class Place(NamedTuple):
    """The place of a tensor from a file in a tensor of all experts, `[E, parts · rows, columns]`."""

    expert: int
    part: int
    """Index among the parts that lie below each other: gate_proj, then up_proj."""
    parts: int

    def of(self, whole: Tensor) -> Tensor:
        """The rows of the whole tensor that this place stands for, as a view."""
        return whole[self.expert].chunk(self.parts)[self.part]


class StockNames:
    """Names of a model's weights for those in the files of its type; only mixtures have others.

    Args:
        model_type: Type of the model in its config.json.
    """

    def __init__(self, model_type: str) -> None:
        conversions = (get_checkpoint_conversion_mapping(model_type) or []) if model_type in EXPERTS else []
        self._renamed: list[tuple[str, str]] = []
        self._joined: list[tuple[re.Pattern[str], str, int, int]] = []
        for each in conversions:
            sources, (target,) = each.source_patterns, each.target_patterns
            if isinstance(each, WeightConverter):  # experts below each other, then gate above up
                for part, source in enumerate(sources):
                    pattern = re.compile(re.escape(source).replace(r"\*", r"(\d+)"))
                    self._joined.append((pattern, target, part, len(sources)))
            else:
                self._renamed += [(source, target) for source in sources]

    def __call__(self, key: str) -> tuple[str, Place | None]:
        """Return the name of the model's tensor, and the place in it; None where it is the whole tensor."""
        for source, target in self._renamed:
            key = re.sub(source, target, key)
        for pattern, target, part, parts in self._joined:
            if match := pattern.search(key):
                return pattern.sub(target, key), Place(int(match[1]), part, parts)
        return key, None
