"""Publishing when something goes wrong: it tries again or says one line, and no repository is half of anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest
from support.hub_client import environment

pytestmark = pytest.mark.heavy
LFS = "PUT /lfs/"
COMMIT = "POST /api/models/.*/commit/"


def one_line(done, status, said):
    """Check that a command failed with one line that says `said`."""
    assert (done.status, done.out) == (status, ""), done.err
    assert done.err.startswith("selfpruner: ")
    assert done.err.index("\n") == len(done.err) - 1, done.err
    assert said in done.err


def weights(hub, name):
    return hub.files(name).get("model.safetensors")


@pytest.fixture
def published(push, hub, saved_models, repo_name):
    """A repository that holds the first model; the second is to replace it."""
    assert push(saved_models / "first", repo_name).status == 0
    hub.reset()
    return hub.files(repo_name)


@pytest.mark.parametrize(
    ("pattern", "fault", "waited"),
    [
        (LFS, {"drop_after": 5000}, True),
        (LFS, {"status": 500, "times": 2}, True),
        (COMMIT, {"status": 500}, True),
        (COMMIT, {"status": 500, "after": True}, True),
        (COMMIT, {"after": True}, True),
        (COMMIT, {"drop_after": 100}, True),
        (COMMIT, {"status": 429, "headers": {"Retry-After": "7"}}, 7),
        ("/preupload/", {"status": 429, "headers": {"RateLimit": '"api";r=0;t=5'}}, 6),
        ("/validate-yaml", {"status": 502}, True),
        ("/repos/create", {"status": 503}, True),
        ("/tree/", {"status": 504}, True),
    ],
    ids=lambda value: str(value) if not isinstance(value, bool) else "",
)
def test_what_fails_for_a_moment_is_tried_again(pattern, fault, waited, push, hub, saved_models, published, repo_name):
    hub.plan(pattern, **fault)
    done = push(saved_models / "second", repo_name)
    assert (done.status, done.err) == (0, "")
    assert not any(fault.times for fault in hub.faults)
    assert waited is True or waited in done.waited
    assert weights(hub, repo_name) == (saved_models / "second" / "model.safetensors").read_bytes()
    assert len(hub.repo(repo_name).history) == 3  # and not two commits for one push


@pytest.mark.parametrize(
    ("pattern", "fault", "status", "said"),
    [
        (LFS, {"drop_after": 5000, "times": 99}, 1, "connection"),
        (LFS, {"status": 500, "times": 99}, 1, "status 500"),
        (COMMIT, {"status": 500, "times": 99}, 1, "status 500"),
        (COMMIT, {"status": 429, "headers": {"Retry-After": "3600"}, "times": 99}, 1, "pause"),
        (COMMIT, {"status": 412, "times": 99}, 1, "changed by someone else"),
        (COMMIT, {"status": 409, "times": 99}, 1, "changed by something else"),
        (COMMIT, {"status": 403, "times": 99}, 2, "no right"),
        ("/preupload/", {"status": 404, "times": 99}, 2, "has no 'me/"),
        ("/repos/create", {"status": 402, "times": 99}, 2, "paid plan"),
    ],
    ids=lambda value: str(value),
)
def test_what_goes_on_failing_is_one_line_and_changes_nothing(
    pattern, fault, status, said, push, hub, saved_models, published, repo_name
):
    if "create" in pattern:
        del hub.repos["model", repo_name]
    hub.plan(pattern, **fault)
    one_line(push(saved_models / "second", repo_name), status, said)
    if "create" in pattern:
        assert ("model", repo_name) not in hub.repos
    else:
        assert hub.files(repo_name) == published
        hub.reset()
        assert push(saved_models / "second", repo_name).status == 0  # the same command again goes through
        assert weights(hub, repo_name) == (saved_models / "second" / "model.safetensors").read_bytes()


def test_large_files_that_arrived_are_not_sent_again(push, hub, saved_model, repo_name):
    hub.plan(COMMIT, 500, times=99)
    assert push(saved_model, repo_name).status == 1
    assert hub.received >= (saved_model / "model.safetensors").stat().st_size
    hub.reset()
    assert push(saved_model, repo_name).status == 0
    assert hub.received == 0


def test_someone_else_pushes_in_between(push, hub, saved_models, published, repo_name):
    """What was found unchanged before may have changed since: then nothing of ours goes in."""
    repo = hub.repo(repo_name)
    tree = {**repo.commits[repo.refs["main"]], "config.json": hub.put(b"{}", False)}
    hub.between = lambda: repo.commit("main", tree, "By someone else")
    one_line(push(saved_models / "second", repo_name), 1, "changed by someone else")
    assert hub.files(repo_name)["config.json"] == b"{}"
    assert weights(hub, repo_name) == published["model.safetensors"]


@pytest.mark.parametrize(
    ("token", "name", "said"),
    [
        ("hf_expired", "me/{}", "does not accept the token"),
        ("", "me/{}", "does not accept the token"),
        ("hf_read_token_of_me", "me/{}", "no right"),
        ("hf_write_token_of_me", "you/{}", "no right"),
        ("hf_write_token_of_me", "a/b/c", "no name of a repository"),
    ],
    ids=["expired", "none", "reader", "stranger", "no name"],
)
def test_who_may_not(token, name, said, push, hub, saved_model, repo_name):
    name = name.format(repo_name.partition("/")[2])
    one_line(push(saved_model, name, token=token), 2, said)
    assert ("model", name) not in hub.repos


def test_a_pull_request_is_not_opened_twice(push, hub, saved_models, published, repo_name):
    hub.plan(COMMIT, 500, after=True)
    one_line(push(saved_models / "second", repo_name, "--create-pr"), 1, "See whether it is there")
    assert [ref for ref in hub.repo(repo_name).refs if "pr" in ref] == ["refs/pr/1"]


def test_a_space_that_fails_is_told_apart(push, hub, saved_model, repo_name):
    hub.plan("/api/spaces/.*/commit/", 403, times=99)
    one_line(push(saved_model, repo_name, "--space"), 2, "The model is published, its Space is not")
    assert weights(hub, repo_name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: (model / "modeling_selfpruned.py").unlink(), "modeling_selfpruned.py is missing"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda model: (model / "model.safetensors").write_bytes(b"\0" * 100), "damaged or cut off"),
        (lambda model: (model / "selfpruner.json").write_text("{"), "damaged"),
        (lambda model: shutil.rmtree(model), "not a model that selfpruner saved"),
        (lambda model: (model / "onnx").mkdir(), "holds no export"),
    ],
    ids=["code", "weights", "cut", "record", "directory", "export"],
)
def test_what_is_not_whole_is_not_published(damage, said, push, hub, saved_model, repo_name):
    damage(saved_model)
    one_line(push(saved_model, repo_name), 2, said)
    assert not hub.requests


def test_a_missing_shard(push, hub, saved_model, repo_name):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (saved_model / "model.safetensors.index.json").write_text(json.dumps(index))
    (saved_model / "model.safetensors").rename(saved_model / "model-00001-of-00002.safetensors")
    one_line(push(saved_model, repo_name), 2, "model-00002-of-00002.safetensors is missing")
    assert not hub.requests


def test_a_card_that_the_hub_does_not_take(push, hub, saved_model, repo_name):
    record = json.loads((saved_model / "selfpruner.json").read_text())
    (saved_model / "selfpruner.json").write_text(json.dumps({**record, "licence": {"license": "mine"}}))
    one_line(push(saved_model, repo_name), 2, 'The Hub refuses the card: - "license" must be one of')
    assert set(hub.files(repo_name)) == {".gitattributes"}
    assert hub.received == 0  # found out before anything was sent


def test_an_unknown_export(push, hub, saved_model, repo_name):
    one_line(push(saved_model, repo_name, "--with", "tarball"), 2, "Unknown format 'tarball'")
    assert not hub.requests


def test_a_push_that_is_killed_is_simply_repeated(hub, push, saved_models, published, repo_name, tmp_path):
    hub.plan(COMMIT, delay=60)
    command = [sys.executable, "-m", "selfpruner_hub.cli", "push", str(saved_models / "second"), repo_name, "--quiet"]
    env = environment(hub.url, tmp_path, HF_TOKEN="hf_write_token_of_me")
    with subprocess.Popen(command, env=env) as process:
        deadline = time.monotonic() + 60
        while hub.faults[0].times and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert hub.files(repo_name) == published
    hub.reset()
    assert push(saved_models / "second", repo_name).status == 0
    assert hub.received == 0


# -- downloads --------------------------------------------------------------------------------------------------------

LOAD = """
from selfpruner_hub import PrunedModel
from selfpruner_hub.errors import SelfPrunerError
{before}
try:
    PrunedModel.from_pretrained({name!r}, cache_dir={cache!r}, **{more!r})
    print("loaded")
except SelfPrunerError as error:
    print(error)
finally:
    {after}
"""


@pytest.fixture
def load(hub_client, hub, push, saved_models, repo_name, tmp_path):
    """Publish a model, then load it by its name with an empty cache; gives back what that says."""
    assert push(saved_models / "first", repo_name).status == 0
    hub.reset()

    def load(before="", after="pass", token="hf_write_token_of_me", **more):
        cache = str(tmp_path / "cache")
        code = LOAD.format(before=before, after=after, name=repo_name, cache=cache, more=more)
        done = hub_client(code=code, HF_TOKEN=token)
        assert done.status == 0, done.err
        return done.out.rstrip("\n")

    return load


@pytest.mark.parametrize(
    "fault",
    [{"drop_after": 5000}, {"drop_after": 5000, "times": 3}, {"status": 429, "headers": {"Retry-After": "2"}}],
    ids=str,
)
def test_a_download_goes_on_where_it_was_cut_off(fault, load, hub):
    hub.plan("GET /lfs/", **fault)
    assert load(before="import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 1000") == "loaded"
    ranges = [request.partition("bytes=")[2] for request in hub.requests if "bytes=" in request]
    assert ranges == [f"{5000 * n}-" for n in range(1, 1 + fault.get("times", 1))] * ("drop_after" in fault)


@pytest.mark.parametrize(
    ("pattern", "fault", "said"),
    [
        ("GET /lfs/", {"drop_after": 0, "times": 99}, "out of reach"),
        ("GET /lfs/", {"status": 403, "times": 99}, "no right"),
        ("GET /api/models/", {"status": 500, "times": 99}, "failed (status 500)"),
        ("GET /api/models/", {"status": 429, "times": 99}, "asks for a pause"),
    ],
    ids=str,
)
def test_a_download_that_goes_on_failing_is_one_line(pattern, fault, said, load, hub):
    hub.plan(pattern, **fault)
    told = load()
    assert said in told
    assert "\n" not in told
    hub.reset()
    assert load() == "loaded"


def test_a_full_disk(load, hub):
    """The limit of the size of files stands in for the end of the disk: the write itself fails."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"
    told = load(before=limit.format(20_000), after=limit.format("resource.RLIM_INFINITY"))
    assert told.startswith("The disk is full.")
    assert "\n" not in told
    assert load() == "loaded"


def test_who_may_not_read(load, hub, repo_name):
    hub.repo(repo_name).private = True
    assert "is not on the Hub" in load(token="")
    assert "does not accept the token" in load(token="hf_expired")
    assert load() == "loaded"


def test_a_revision_that_is_not_there(load):
    assert "this revision of it) is not on the Hub" in load(revision="nowhere")
