"""OpenAI-compatible servers of language models: their address, the key for it, and what their errors mean."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

from huggingface_hub.errors import OfflineModeIsEnabled

from selfpruner_hub.errors import EndpointError, SelfPrunerError, UserError

_T = TypeVar("_T")
KEY_VARIABLE = "SELFPRUNER_API_KEY"
_KEYS_BY_HOST = {"api.openai.com": "OPENAI_API_KEY", "router.huggingface.co": "HF_TOKEN"}
_RETRIES = 4
_FIRST_PAUSE = 1.0
"""Pause before the first retry, in seconds; doubled for each further retry."""


class Endpoint:
    """Server that is asked over HTTP.

    The API key comes from the environment alone (`SELFPRUNER_API_KEY`; `OPENAI_API_KEY` and `HF_TOKEN` only for their
    own hosts), and is written to no log, journal or error.

    Args:
        url: Base URL, such as `http://127.0.0.1:8080/v1`.
        environment: Variables in which the key is looked up; None uses the process's environment.

    Raises:
        UserError: The URL is malformed.
    """

    def __init__(self, url: str, environment: Mapping[str, str] | None = None) -> None:
        parts = _parts(url)
        variables = os.environ if environment is None else environment
        self.url = url.rstrip("/")
        self.host = parts.netloc
        """Name and port of the server; path and query may hold a key, so no message shows them."""
        self.key = variables.get(KEY_VARIABLE) or variables.get(_KEYS_BY_HOST.get(str(parts.hostname), ""), "")
        """Key, or an empty text."""

    def tried(self, send: Callable[[], _T], model: str) -> _T:
        """Send a request; repeat it after a pause where the error may be temporary.

        Args:
            send: Function that sends it and returns the answer.
            model: Name of the model that is asked, for messages.

        Returns:
            The answer.

        Raises:
            UserError: The server refuses the key, or has no such model.
            EndpointError: The server refuses this request, or does not answer.
        """
        for attempt in range(_RETRIES):
            try:
                return send()
            except SelfPrunerError:
                raise
            except Exception as error:  # HTTP, time-out, connection, malformed answer: clients have many kinds
                self._give_up_or_wait(error, model, attempt)
        raise EndpointError(f"The endpoint did not answer after {_RETRIES} tries.")

    def _give_up_or_wait(self, error: Exception, model: str, attempt: int) -> None:
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError("HF_HUB_OFFLINE is set, and the client obeys it for endpoints too.", "Unset it.") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"{self.host} refuses the key (HTTP {status}).", f"Set {KEY_VARIABLE}.") from None
        if status == 404:
            raise UserError(f"{self.host} has no model {model!r} at this address (HTTP 404).") from None
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise EndpointError(f"The endpoint refuses the request (HTTP {status}).") from None
        if attempt + 1 < _RETRIES:
            time.sleep(_FIRST_PAUSE * 2**attempt)


def check_writer(url: str | None, name: str | None) -> None:
    """Check a server that is to write the text, before anything is loaded.

    Args:
        url: Its base URL; None for none.
        name: Name of the model there.

    Raises:
        UserError: The URL is malformed, or there is a name and no server.
    """
    if url is not None:
        _parts(url)
    elif name is not None:
        raise UserError("writer_model names a model of a server that is not given.", "Give writer (--writer), its URL.")


def _parts(url: str) -> SplitResult:
    """Split a URL; refuse one that is malformed, or that holds a user name or a password."""
    with suppress(ValueError):  # brackets of an address or a port that are none
        parts = urlsplit(url)
        if parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0 and "@" not in parts.netloc:
            return parts
    raise UserError("The URL of an endpoint must be http(s)://HOST/… without a user name or password.")
