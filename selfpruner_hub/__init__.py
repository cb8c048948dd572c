"""Structured pruning of causal language models: measure what each layer can lose, cut, repair, recover."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfpruner_hub.pruned_model import PrunedModel
    from selfpruner_hub.pruner import AutoPruner

__all__ = ["AutoPruner", "PrunedModel"]
__version__ = "0.2.0"

# The public classes are imported at their first use, because torch takes seconds and `selfpruner --help` needs none.
# With them come `models.modeling_selfpruned`, which registers pruned models with the Auto classes of transformers.
if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept any name
    _MODULES = {"AutoPruner": "selfpruner_hub.pruner", "PrunedModel": "selfpruner_hub.pruned_model"}

    def __getattr__(name: str) -> object:
        """Import a public class at its first use."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value

    def __dir__() -> list[str]:
        """List the public classes too, whether or not they are imported."""
        return sorted({*globals(), *__all__})
