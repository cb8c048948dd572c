"""The errors of this package: each says what is wrong and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class SelfPrunerError(Exception):
    """Base of every error that a user can act on.

    Args:
        message: Description of the error, in one line.
        hint: Remedy, in one line; printed after the message.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the message and the hint as one line."""
        return " ".join(" ".join((self.message, self.hint)).split())


class UserError(SelfPrunerError):
    """A mistake in what the user asked for: the command line answers it with exit status 2."""


class UnsupportedArchitectureError(UserError):
    """The model's type is not in the table of supported architectures."""


class BudgetError(UserError):
    """The mean rate β is malformed, or cannot be reached within the bounds of the rates."""


class DataError(UserError):
    """The calibration text is missing, unreadable or too short."""


class ModelError(UserError):
    """The model cannot be found, read or used: gated, missing, truncated, or with NaN in its weights."""


class SavedModelError(UserError):
    """A directory or repository is not a model that this package saved, or its record is damaged."""


class OutputError(UserError):
    """Results cannot be written where the user asked for them."""


class MissingExtraError(UserError):
    """An optional library is not installed.

    Args:
        library: Name of the missing module.
        extra: Name of the extra of this package that installs it.
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed.", f'Install it with: pip install "selfpruner-hub[{extra}]"')


class ExportError(SelfPrunerError):
    """A model could not be written in another format, or the export differs from the model."""


class RepositoryError(UserError):
    """The Hub refuses a request: the token is invalid or may not write, or the name or the card is invalid."""


class HubError(SelfPrunerError):
    """The Hub is unreachable or failed; the same call may work later."""


class RunMismatchError(UserError):
    """A run directory holds the journal of another search."""


class EndpointError(SelfPrunerError):
    """A server of a language model refuses a request or does not answer; the same call may work later."""


class ProposerError(SelfPrunerError):
    """A proposer could not answer; the search uses a child of the evolution proposer instead."""


def check_protocol(given: object, what: str, parts: Sequence[str]) -> None:
    """Check that an object of a user has what is read of it.

    Args:
        given: The object.
        what: What it is given as, for the message.
        parts: Names of the attributes that it needs.

    Raises:
        UserError: It lacks one.
    """
    if missing := [part for part in parts if not hasattr(given, part)]:
        raise UserError(
            f"The {what}, of type {type(given).__name__}, has no {missing[0]}.",
            f"Give a name, or an object with {', '.join(parts)}.",
        )
