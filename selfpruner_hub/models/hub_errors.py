"""Turn errors of the Hub's client into one line with a remedy, and decide which calls to retry."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator

import httpx2
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from selfpruner_hub.errors import HubError, OutputError, RepositoryError, SelfPrunerError

TRANSIENT = (408, 429, 500, 502, 503, 504)
"""HTTP statuses of temporary failures: those that huggingface_hub retries, in the calls that it retries."""
LONGEST_PAUSE = 60.0
"""Maximum pause in seconds; if a server asks for more, the user gets an error instead."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def causes(error: BaseException) -> list[BaseException]:
    """An error and the chain of its causes, outermost first, at most 8."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 8:
        chain.append(cause)
    return chain


def status_of(error: BaseException) -> int | None:
    """The HTTP status that caused an error; None if the server did not answer."""
    return next((e.response.status_code for e in causes(error) if isinstance(e, HfHubHTTPError)), None)


def is_full_disk(error: BaseException) -> bool:
    """Whether a full disk, a quota or a file size limit caused an error."""
    return any(isinstance(e, OSError) and e.errno in _FULL for e in causes(error))


def pause(error: BaseException) -> float | None:
    """Decide how long to wait before a retry.

    Args:
        error: Error from a call of the Hub's client.

    Returns:
        Seconds, 0 if the server names none; None if a retry would not help.
    """
    if is_full_disk(error):
        return None
    status = status_of(error)
    if status is None:
        return 0.0 if any(isinstance(e, (httpx2.TransportError, json.JSONDecodeError)) for e in causes(error)) else None
    if status not in TRANSIENT:
        return None
    seconds = next(_waits(error), 0.0)
    return seconds if seconds <= LONGEST_PAUSE else None


def may_have_committed(error: BaseException) -> bool:
    """Whether a commit may have succeeded although its call failed: no answer, or a failure inside the server."""
    status = status_of(error)
    if status is not None and (status < 500 or status == 503):
        return False
    answered = [e.response.request for e in causes(error) if isinstance(e, HfHubHTTPError)]
    dropped = [e.request for e in causes(error) if isinstance(e, httpx2.TransportError)]
    return any("/commit/" in request.url.path for request in (*answered, *dropped))


def explain_hub(error: BaseException, repo: str) -> SelfPrunerError | None:
    """Turn an error of the Hub's client into one line with a remedy.

    Args:
        error: Error from a call of the Hub's client.
        repo: Name of the repository.

    Returns:
        The error to raise; None if the Hub did not cause it.
    """
    if is_full_disk(error):
        return OutputError("The disk is full.", "Make room (HF_HOME names another place for downloads), then repeat.")
    for e in causes(error):  # first the client's own messages, because a status caused some of them
        for start, what in _OF_CONTENT.items():
            if isinstance(e, ValueError) and start in str(e):
                return RepositoryError(f"The Hub refuses {what}: {_line(str(e).partition(start)[2])}.")
    if (status := status_of(error)) is not None:
        return _of_status(status, error, repo)
    for e in causes(error):
        if explained := next((make(*texts) for kind, make, *texts in _BY_KIND if isinstance(e, kind)), None):
            return explained
    return None


_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."
_BY_KIND: tuple[tuple[type[Exception], type[SelfPrunerError], str, str], ...] = (
    (HFValidationError, RepositoryError, "That is no name of a repository.", "Give one such as your-name/your-model."),
    (LocalTokenNotFoundError, RepositoryError, "No token is stored.", _LOG_IN),
    (OfflineModeIsEnabled, RepositoryError, "The Hub's client is in offline mode.", "Unset HF_HUB_OFFLINE."),
    (httpx2.TransportError, HubError, "The connection to the Hub failed.", "Check the network and HF_ENDPOINT."),
    (json.JSONDecodeError, HubError, "What answered is not the Hub.", "Check HF_ENDPOINT and proxies."),
)
_OF_CONTENT = {
    "Invalid metadata in README.md.": "the card",
    "LFS batch API returned errors:": "a file",
}
"""Start of the client's ValueError message, and the object that it refers to."""
_BY_STATUS: dict[int, tuple[type[SelfPrunerError], str, str]] = {
    401: (RepositoryError, "The Hub does not accept the token, or {repo} needs one.", _LOG_IN),
    402: (RepositoryError, "The Hub asks for a paid plan: {said}.", "See the billing page of the account on the Hub."),
    403: (
        RepositoryError,
        "The token gives no right to do this to {repo}.",
        "Use a token with write access, and a name of your own (or of your organisation).",
    ),
    404: (
        RepositoryError,
        "The Hub has no {repo}, or not this revision of it.",
        "Check the name; a private repository needs HF_TOKEN.",
    ),
    409: (HubError, "{repo} is being changed by something else: {said}.", "Repeat in a minute."),
    412: (HubError, "{repo} was changed by someone else in the meantime; nothing was published.", "Repeat."),
    413: (RepositoryError, "A file is larger than the Hub takes.", "Save the model in smaller shards."),
    429: (HubError, "The Hub asks for a pause (too many requests).", "Repeat later: what is there is not sent again."),
}


def _of_status(status: int, error: BaseException, repo: str) -> SelfPrunerError:
    said = next(_line(e.server_message or "") for e in causes(error) if isinstance(e, HfHubHTTPError))
    if status in _BY_STATUS:
        kind, message, hint = _BY_STATUS[status]
        return kind(message.format(repo=repr(repo), said=said or f"status {status}"), hint)
    if status >= 500:
        return HubError(f"The Hub failed (status {status}).", "Repeat later: what is there is not sent again.")
    return RepositoryError(f"The Hub refuses (status {status}): {said or 'it does not say why'}.")


def _waits(error: BaseException) -> Iterator[float]:
    """Yield the pauses that the server asks for, in seconds."""
    for e in causes(error):
        if isinstance(e, HfHubHTTPError) and (text := e.response.headers.get("Retry-After", "")).isdigit():
            yield float(text)


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")[:300]
