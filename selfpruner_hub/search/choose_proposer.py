"""Which proposer a word stands for."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.search.llm.endpoint import EndpointProposer
from selfpruner_hub.search.llm.local_model import ModelProposer
from selfpruner_hub.search.proposers import EvolutionProposer, Proposer, RandomProposer
from selfpruner_hub.settings import Method


def choose_proposer(
    proposer: str | Proposer,
    endpoint_model: str | None,
    budget: Budget,
    method: Method,
    subject: str,
    own: tuple[PreTrainedModel, PreTrainedTokenizerBase | None],
) -> Proposer:
    """Make the proposer that is asked for.

    Args:
        proposer: As `AutoPruner.prune` takes it.
        endpoint_model: Name of the model at the endpoint.
        budget: Of the search.
        method: Settings of the search; without evaluations nobody is asked, and nothing is loaded.
        subject: Name of the model that is being pruned, for the prompts.
        own: That model and its tokenizer, for `"self"`.

    Returns:
        The proposer; an object with the protocol comes back as it is.

    Raises:
        UserError: Nothing goes by that name, or the model has no tokenizer to be asked with.
        ModelError: The directory or repository does not load.
    """
    if not isinstance(proposer, str):
        return proposer
    if proposer == "evolution" or not method.evaluations:
        return EvolutionProposer(budget)
    if proposer == "random":
        return RandomProposer(budget)
    if "://" in proposer:
        return EndpointProposer(
            proposer,
            endpoint_model,
            budget,
            subject,
            temperature=method.temperature,
            request_limit=method.request_limit,
            token_limit=method.token_limit,
            templates=method.template_directory,
        )
    if proposer == "self":
        asked, tokenizer = own
    elif "/" in proposer or Path(proposer).is_dir():
        asked, tokenizer = load_model(proposer, any_architecture=True, dtype="auto")
    else:
        raise UserError(
            f"Unknown proposer {proposer!r}.",
            "Choose self, evolution, random, a directory or Hub repository of a language model, the URL of an "
            "endpoint, or pass an object with ask and tell.",
        )
    if tokenizer is None:
        raise UserError(
            f"proposer={proposer!r} needs the model's tokenizer, and there is none.", 'Use proposer="evolution".'
        )
    return ModelProposer(
        asked,
        tokenizer,
        budget,
        subject,
        temperature=method.temperature,
        templates=method.template_directory,
        name=proposer if proposer == "self" else Path(proposer).name,
    )
