"""selfpruner_hub: language models that find out by themselves how much each of their layers can lose."""

from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner

__all__ = ["AutoPruner", "PrunedModel"]
__version__ = "0.2.0"
