"""Make the proposer that a name stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.errors import UserError, check_protocol
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.search.llm.endpoint_proposer import EndpointProposer
from selfpruner_hub.search.llm.local_model import ModelProposer
from selfpruner_hub.search.proposers import EvolutionProposer, Proposer, RandomProposer
from selfpruner_hub.search.slopes import SlopesProposer
from selfpruner_hub.settings import EndpointOptions, proposer_options

WITHOUT_MODEL: dict[str, Callable[[Budget], Proposer]] = {
    "evolution": EvolutionProposer,
    "slopes": SlopesProposer,
    "random": RandomProposer,
}
"""Proposers that ask no language model, by name."""


def choose_proposer(
    proposer: str | Proposer | None,
    endpoint_model: str | None,
    options: Mapping[str, Any] | None,
    budget: Budget,
    searches: bool,
    subject: str,
    own: tuple[PreTrainedModel, PreTrainedTokenizerBase | None],
) -> Proposer:
    """Make the proposer that is asked for.

    Args:
        proposer: Name, model, URL or object, as for `AutoPruner.prune`; None is `"self"`.
        endpoint_model: Name of the model at the endpoint.
        options: Options of a language model that proposes, by name; None takes their defaults.
        budget: Parameter budget of the search.
        searches: Whether there is a search; without one no proposer is asked, so no model is loaded.
        subject: Name of the model that is being pruned, for the prompts.
        own: Model that is being pruned, and its tokenizer; `"self"` asks them.

    Returns:
        The proposer; an object that follows the protocol is returned unchanged.

    Raises:
        UserError: The name or an option is unknown, options are given to a proposer that is no language model, the
            object follows no protocol, or the model that proposes has no tokenizer.
        ModelError: The directory or repository does not load.
    """
    if proposer is None:
        proposer = "self"
    checked = proposer_options(proposer, options)
    if options and (not isinstance(proposer, str) or proposer in WITHOUT_MODEL):
        raise UserError("proposer_options are those of a language model, and this proposer is none.", "Leave them out.")
    if not isinstance(proposer, str):
        check_protocol(proposer, "proposer", ("name", "ask", "tell"))
        return proposer
    if proposer in WITHOUT_MODEL or not searches:
        return WITHOUT_MODEL.get(proposer, EvolutionProposer)(budget)
    if isinstance(checked, EndpointOptions):
        return EndpointProposer(proposer, endpoint_model, budget, subject, checked)
    if proposer == "self":
        model, tokenizer = own
    elif "/" in proposer or Path(proposer).is_dir():
        model, tokenizer = load_model(proposer, any_architecture=True, dtype="auto", device=own[0].device)
    else:
        raise UserError(
            f"Unknown proposer {proposer!r}.",
            "Choose self, evolution, slopes, random, a directory or Hub repository of a language model, the URL of an "
            "endpoint, or pass an object with ask and tell.",
        )
    if tokenizer is None:
        raise UserError(
            f"proposer={proposer!r} needs the model's tokenizer, and there is none.", 'Use proposer="evolution".'
        )
    name = proposer if proposer == "self" else Path(proposer).name
    return ModelProposer(model, tokenizer, budget, subject, checked, name=name)
