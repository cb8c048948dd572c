"""Settings of the method, of its search, and of a language model that proposes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SearchSchedule:
    """Length of the search, and how its rounds spend it."""

    evaluations: float | None = None
    """Greatest length of the search, in evaluations on the whole fitness text; 0 takes the best seed. Not given: 10
    where a proposer is given, else 0."""
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
    """Share of the fitness windows on which small changes of the best plan are measured, for a proposer that reads
    them; 0 measures none."""

    @property
    def length(self) -> float:
        """Greatest length of the search, in evaluations on the whole fitness text; 0 where none was chosen."""
        return self.evaluations or 0


@dataclass(frozen=True)
class PruneSettings:
    """Every setting of `prune` that is not about where things come from; all of them go into the record."""

    importance: str = "obs"
    """Order in which FFN channels and KV groups are removed: obs, wanda-sp, flap or energy. Of experts: reap-sum
    (also where one of the former is given), reap or frequency."""
    repair: str = "full"
    """Least-squares fit of the weights that are left. none; output: o_proj and down_proj, each layer alone (the first
    repair); sequential: both again, layer by layer on the activations of the pruned model (the second repair); full:
    gate_proj and up_proj in the second repair too. Of a mixture, the last two refit the output projections of experts,
    and the first two nothing."""
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
    fewest_experts: int = 0
    """Fewest routed experts that a layer of a mixture keeps. 0 is as many as a token is routed to; a layer with fewer
    routes every token to all of its own."""
    kv_multiple: int = 1
    """KV heads of every layer are a multiple of this number, such as the size of tensor parallelism. It must divide the
    dense number."""
    uniform: bool = False
    """Give the FFNs of all layers one width, or one number of experts, and keep all attention: the result is a stock
    model."""
    window: int = 512
    """Tokens of a window of calibration and fitness text."""
    calibration_tokens: int = 73_728
    """Tokens of the calibration text, to which both repairs are fitted."""
    shares: float | tuple[float, ...] = 0.5
    """Shares of the sources of `data`, in their order; they need not sum to 1. One number is the share of each source
    that the model writes (`chat`, `self`), where one that is read has 1."""
    fisher_tokens: int = 8_192
    """Calibration tokens of the one backward pass that measures the Fisher information of the layers' outputs. They
    keep their proportion to calibration_tokens unless given."""
    fitness_tokens: int = 16_384
    """Tokens of the fitness text, on which the search selects plans. It is disjoint from the calibration text. They
    keep their proportion to calibration_tokens unless given. Without a search, plans are scored on the first
    schedule.first_share of it."""
    seeds: tuple[str, ...] = ("uniform", "ramp", "sensitivity", "refined")
    """Plans that the search starts from: uniform rates, a ramp over depth, a knapsack over predicted losses
    (sensitivity), the same after a step along measured effects (refined), and its mean with uniform rates (blend)."""
    schedule: SearchSchedule = SearchSchedule()
    """Length of the search, and how its rounds spend it."""

    def record(self) -> dict[str, Any]:
        """All settings as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @property
    def predicts_losses(self) -> bool:
        """Whether one of the seeds is made from predicted losses."""
        return bool({"sensitivity", "refined", "blend"} & set(self.seeds))

    @property
    def repairs_twice(self) -> bool:
        """Whether a second repair follows the first."""
        return self.repair in ("sequential", "full")

    @property
    def weighs_excess(self) -> bool:
        """Whether plans are scored by `SecondRepairScore`, as a second repair takes part of the excess away.

        One that leaves gate and up as they are takes too little of it: weighed so, plans lost too much attention, and
        were worse on articles, conversations and code.
        """
        return self.repair == "full"


@dataclass(frozen=True)
class LanguageModelOptions:
    """How a language model that proposes is asked."""

    temperature: float = 1.0
    """Sampling temperature."""
    templates: str = ""
    """Directory with `initial.txt`, `crossover.txt` and `mutation.txt` in place of the built-in prompts."""

    def record(self) -> dict[str, Any]:
        """Options that change the replies, as JSON values; the prompts themselves are recorded by the caller."""
        return {"temperature": self.temperature}

    @property
    def template_directory(self) -> Path | None:
        """Directory of the prompts; None for the built-in ones."""
        return Path(self.templates) if self.templates else None


@dataclass(frozen=True)
class EndpointOptions(LanguageModelOptions):
    """How a language model behind an endpoint is asked."""

    request_limit: int = 2_000
    """Largest number of requests, retries included."""
    token_limit: int = 5_000_000
    """Largest number of tokens that the endpoint reads and writes."""
    token_price: float = 0.0
    """Price of a million tokens, in dollars, for the progress line; 0 shows none."""

    def record(self) -> dict[str, Any]:
        """Options that change the replies, as JSON values."""
        return {**super().record(), "request_limit": self.request_limit, "token_limit": self.token_limit}
