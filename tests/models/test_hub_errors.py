"""Whatever the Hub's client raises becomes one line with a remedy, and is tried again only where that can help."""

import errno
import json

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from selfpruner_hub.errors import HubError, OutputError, RepositoryError
from selfpruner_hub.models.hub_errors import LONGEST_PAUSE, explain_hub, may_have_committed, pause


def answer(status, said="", path="", **headers):
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("POST", f"https://hub/api/{path}"))
    return HfHubHTTPError("long text\nwith lines", response=response, server_message=said)


def dropped(path):
    return httpx2.ReadError("dropped", request=httpx2.Request("POST", f"https://hub/api/{path}"))


def behind(error):
    """As LFS uploads wrap what happened in their threads."""
    try:
        raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from error
    except RuntimeError as wrapped:
        return wrapped


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (answer(401), RepositoryError, "token"),
        (answer(402, "a paid plan\nis needed"), RepositoryError, "a paid plan is needed"),
        (answer(403), RepositoryError, "no right"),
        (answer(404), RepositoryError, "has no 'me/x'"),
        (answer(409, "Busy."), HubError, "Busy."),
        (answer(412), HubError, "changed by someone else"),
        (answer(413), RepositoryError, "shards"),
        (answer(418, "A teapot."), RepositoryError, "A teapot."),
        (answer(429), HubError, "pause"),
        (answer(500), HubError, "status 500"),
        (answer(503), HubError, "status 503"),
        (httpx2.ConnectError("refused"), HubError, "HF_ENDPOINT"),
        (httpx2.ReadTimeout("slow"), HubError, "network"),
        (json.JSONDecodeError("no JSON", "<html>", 0), HubError, "not the Hub"),
        (ValueError("LFS batch API returned errors:\nfor OID 1: `Quota exceeded"), RepositoryError, "Quota exceeded"),
        (OfflineModeIsEnabled("offline"), RepositoryError, "HF_HUB_OFFLINE"),
        (LocalTokenNotFoundError("none"), RepositoryError, "hf auth login"),
        (HFValidationError("bad"), RepositoryError, "no name"),
        (ValueError("Invalid metadata in README.md.\n- bad licence"), RepositoryError, "bad licence"),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "full"),
        (OSError(errno.EDQUOT, "Quota"), OutputError, "full"),
    ],
    ids=lambda value: type(value).__name__ + str(getattr(getattr(value, "response", None), "status_code", "")),
)
def test_one_line_with_a_remedy(error, kind, said):
    for raised in (error, behind(error)):
        told = explain_hub(raised, "me/x")
        assert type(told) is kind
        assert said in str(told)
        assert "\n" not in str(told)


def test_what_is_not_the_hubs_is_left_alone():
    assert explain_hub(KeyError("mine"), "me/x") is None
    assert pause(KeyError("mine")) is None


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (answer(500), 0.0),
        (answer(429, **{"Retry-After": "7"}), 7.0),
        (answer(429, **{"Retry-After": str(int(LONGEST_PAUSE) + 1)}), None),
        (answer(503, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), 0.0),
        (httpx2.ReadError("dropped"), 0.0),
        (answer(401), None),
        (answer(412), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
    ],
    ids=str,
)
def test_what_is_tried_again(error, seconds):
    assert pause(error) == pause(behind(error)) == seconds


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answer(429, path="commit/main"), False),
        (answer(503, path="commit/main"), False),
        (answer(500, path="commit/main"), True),
        (answer(500, path="preupload/main"), False),
        (dropped("commit/main"), True),
        (dropped("preupload/main"), False),
    ],
    ids=lambda value: str(value).split(chr(10))[0],
)
def test_whether_a_commit_may_stand(error, expected):
    assert may_have_committed(error) is may_have_committed(behind(error)) is expected
