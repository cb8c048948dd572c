"""Publishing: one commit with the model, its record, plots and card, made from saved files; optionally a Space.

There is no state between two calls except the files and the content of the repository, so an interrupted call can be
repeated: large files that arrived are not sent again, and a repository that is up to date gets no commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from selfpruner_hub.errors import HubError, SelfPrunerError, UserError
from selfpruner_hub.hub.bundle import CARD, ONNX, Bundle, collect, is_ours
from selfpruner_hub.hub.card import render_card, render_onnx_card
from selfpruner_hub.hub.privacy import check_private
from selfpruner_hub.hub.space import DENSE, VENDORED, space_files, static_files
from selfpruner_hub.models.hub_errors import explain_hub, may_have_committed, pause
from selfpruner_hub.storage.layout import EXPORTS

GRAPHS = "-ONNX"
"""Ending of the name of the repository with a model's graphs, as in the Hub's onnx-community."""
SPACES = GRADIO, STATIC = ("gradio", "static")
"""Kinds of Spaces: an app on the Hub's machine, or a page that runs in the visitor's browser."""
PAUSES = (2.0, 8.0)
"""Pauses before the second and the third try, in seconds: the Hub's client retries uploads itself, but not commits."""
Tree = dict[str, RepoFile]
"""Files of a repository, by path."""
Changes = tuple[dict[str, Path | bytes], list[str]]
"""Files to write, by path, and paths of files to delete."""
Message = tuple[str, str | None]
"""Message of a commit, one line, and the text below it."""
T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """Address of a published model."""

    url: str
    """Address of the model, or of the pull request."""
    commit: str
    changed: bool
    """Whether a commit was made: False where the repository was up to date."""
    graphs: str | None = None
    """Address of the graphs for ONNX Runtime GenAI and Transformers.js; None where there are none."""
    space: str | None = None
    """Address of the demo Space; None where none was published."""


def check_request(*, space: bool | str, create_pr: bool, exports: Sequence[str] = ()) -> None:
    """Refuse options that cannot be published, before any export is made.

    Args:
        space: Kind of the Space to publish as well, one of `SPACES`; True is Gradio's, False none.
        create_pr: Whether to open a pull request instead of a commit.
        exports: Formats of the exports that are made first.

    Raises:
        UserError: A Space is requested together with a pull request, or a format is unknown.
    """
    if space not in (True, False, *SPACES):
        raise UserError(f"Unknown kind of Space {space!r}.", f"Choose {' or '.join(SPACES)}.")
    if space and create_pr:
        raise UserError("A Space shows a model that is there, not one in a pull request.", "Push it after the merge.")
    if "onnx" in exports and create_pr:
        raise UserError("ONNX graphs have a repository of their own, not a pull request.", "Push them after the merge.")
    if unknown := sorted(set(exports) - set(EXPORTS)):
        raise UserError(f"Unknown export {unknown[0]!r}.", f"Choose from: {', '.join(EXPORTS)}.")


def publish(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    space: bool | str = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> Published:
    """Publish a saved model in one commit, completely or not at all.

    Args:
        directory: Directory of a saved model; its exports, in folders such as `directory/gguf`, are published too.
            Graphs for ONNX Runtime GenAI and Transformers.js go to the repository `REPO_ID-ONNX`, except with
            `create_pr`.
        repo_id: Hub repository, `name` or `namespace/name`; created if missing.
        private: Visibility of a new repository; None uses the account's default.
        revision: Branch; created if missing. None is the main branch.
        create_pr: Whether to open a pull request instead of a commit.
        space: Kind of the Space to publish as well: True or `"gradio"` for `REPO_ID-demo`; `"static"` for
            `REPO_ID-browser`, which needs graphs of the model and its parent; False publishes none.
        token: Hub token; None uses the stored one, or HF_TOKEN.
        commit_message: Message of the commit, one line; None writes one.
        commit_description: Text below the message, or None.

    Returns:
        Addresses of the model, its graphs and the Space, and whether a commit to the model was made.

    Raises:
        SavedModelError: The directory holds no complete pruned model, or an export of another one.
        UserError: A Space is requested together with a pull request, a file holds a secret, or the Hub refuses.
        HubError: The Hub is unreachable, or fails.
    """
    directory = Path(directory)
    check_request(space=space, create_pr=create_pr)
    bundle = collect(directory)
    if space == STATIC and not bundle.has_dense_graphs:
        raise UserError(
            "A static Space runs ONNX graphs of the model and of its dense parent, which are not there.",
            "Push with --space static on the command line, which makes them.",
        )
    check_private(
        {
            **bundle.files,
            **{f"{ONNX}/{name}": path for name, path in bundle.graphs.items()},
            CARD: render_card(bundle.record, repo_id).encode(),
        },
        directory,
        [token if isinstance(token, str) else None],
    )

    api = HfApi(token=token, library_name="selfpruner-hub")
    model = _Repository(api, repo_id, "model", revision)
    model.create(private)
    message = (commit_message or "Publish the pruned model", commit_description)
    published = model.commit(lambda tree: _model_changes(bundle, model, tree), message, create_pr)
    if bundle.graphs and not create_pr:
        graphs = _Repository(api, f"{model.repo_id}{GRAPHS}", "model", revision)
        with _after("its ONNX graphs are"):
            graphs.create(private)
            done = graphs.commit(
                lambda tree: _graph_changes(bundle, graphs, model, tree), ("Publish the ONNX graphs", None)
            )
        published = replace(published, graphs=done.url)
    if space:
        if space == STATIC:
            demo = _Repository(api, f"{model.repo_id}-browser", "space")
            files = static_files(bundle.record, graphs.repo_id, api.endpoint, revision)
        else:
            demo = _Repository(api, f"{model.repo_id}-demo", "space")
            files = space_files(bundle.record, model.repo_id, revision)
        with _after("its Space is"):
            demo.create(private, STATIC if space == STATIC else GRADIO)
            done = demo.commit(
                lambda tree: (files, [n for n in _in(VENDORED, tree) if n not in files]), ("Publish the demo", None)
            )
        published = replace(published, space=done.url)
    return published


@contextmanager
def _after(what: str) -> Iterator[None]:
    """Say, of an error, that the model itself is published; `what` names the rest, with its verb."""
    try:
        yield
    except SelfPrunerError as error:
        raise type(error)(f"The model is published, {what} not: {error.message}", error.hint) from error


def _graph_changes(bundle: Bundle, repo: _Repository, model: _Repository, tree: Tree) -> Changes:
    """Return the changes that make a repository hold the graphs of this model, and no files of an earlier one."""
    card = render_onnx_card(
        bundle.record,
        repo.repo_id,
        model.repo_id,
        bundle.graphs,
        revision=repo.revision,
        dense=DENSE if bundle.has_dense_graphs else "",
        chat=bundle.chat,
    )
    files: dict[str, Path | bytes] = {**bundle.graphs, CARD: card.encode()}
    return files, [name for name in tree if is_ours(name) and name not in files]


def _model_changes(bundle: Bundle, repo: _Repository, tree: Tree) -> Changes:
    """Return the changes that make a repository hold this model, and no files of an earlier one.

    Exports that only the repository has are kept if they were made from the same weights.
    """
    kept = [name for name in EXPORTS if name not in bundle.exports and _in([name], tree)]
    if kept and not all(name in tree and _same(path, tree[name]) for name, path in bundle.weights.items()):
        kept = []
    exports = [name for name in EXPORTS if name in (*bundle.exports, *kept)]
    card = render_card(
        bundle.record,
        repo.repo_id,
        repo.revision,
        pictures=list(bundle.pictures),
        exports=exports,
        graphs=f"{repo.repo_id}{GRAPHS}" if bundle.graphs else "",
        chat=bundle.chat,
    )
    files: dict[str, Path | bytes] = {**bundle.files, **bundle.pictures, CARD: card.encode()}
    here = {*files, *_in(kept, tree)}
    return files, [name for name in tree if is_ours(name) and name not in here]


def _in(folders: Sequence[str], tree: Tree) -> list[str]:
    """Return the paths of a repository that are in one of the given folders."""
    return [name for name in tree if "/" in name and name.partition("/")[0] in folders]


def _same(path: Path, there: RepoFile) -> bool:
    """Return whether a file equals that of the repository, by the hash that the Hub stores."""
    if there.lfs is None:
        return git_hash(path.read_bytes()) == there.blob_id
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == there.lfs.sha256


class _Repository:
    """A Hub repository to write to: temporary failures are retried, others raise one of this package's errors."""

    def __init__(self, api: HfApi, repo_id: str, kind: str, revision: str | None = None) -> None:
        self._api = api
        self.repo_id = repo_id
        self.kind = kind
        self.revision = revision

    def create(self, private: bool | None, sdk: str | None = None) -> None:
        """Create the repository if missing; a Space with its SDK."""
        self.repo_id = self._patiently(
            lambda: (
                self._api.create_repo(
                    self.repo_id, repo_type=self.kind, private=private, space_sdk=sdk, exist_ok=True
                ).repo_id
            )
        )

    def commit(self, changes: Callable[[Tree], Changes], message: Message, create_pr: bool = False) -> Published:
        """Commit the changes to the current content, if there are any; the branch is created if missing."""
        branch = self.revision
        if branch and not create_pr and not branch.startswith("refs/"):
            self._patiently(lambda: self._create_branch(branch))
        return self._patiently(lambda: self._commit(changes, message, create_pr), once=create_pr)

    def _create_branch(self, branch: str) -> None:
        self._api.create_branch(self.repo_id, branch=branch, repo_type=self.kind, exist_ok=True)

    def _commit(self, changes: Callable[[Tree], Changes], message: Message, create_pr: bool) -> Published:
        head = self._api.repo_info(self.repo_id, repo_type=self.kind, revision=self.revision).sha
        listed = self._api.list_repo_tree(self.repo_id, repo_type=self.kind, revision=head, recursive=True)
        files, stale = changes({entry.path: entry for entry in listed if isinstance(entry, RepoFile)})
        done = self._api.create_commit(
            self.repo_id,
            [
                *(CommitOperationAdd(name, source) for name, source in sorted(files.items())),
                *(CommitOperationDelete(name) for name in stale),
            ],
            repo_type=self.kind,
            revision=self.revision,
            commit_message=message[0],
            commit_description=message[1],
            create_pr=create_pr,
            parent_commit=head,  # fails if the repository has changed since it was listed
        )
        prefix = "spaces/" if self.kind == "space" else ""
        url = done.pr_url or f"{self._api.endpoint}/{prefix}{self.repo_id}"
        return Published(url, done.oid, done.oid != head)

    def _patiently(self, call: Callable[[], T], once: bool = False) -> T:
        """Call, and retry after temporary failures; with `once`, not where the first call may have succeeded."""
        with self._explained(once):
            for wait in PAUSES:
                try:
                    return call()
                except Exception as error:  # the Hub's client raises many kinds
                    asked = pause(error)
                    if asked is None or (once and may_have_committed(error)):
                        raise
                time.sleep(max(wait, asked))
            return call()

    @contextmanager
    def _explained(self, once: bool) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if once and may_have_committed(error):
                raise HubError(
                    "The Hub failed, or the connection dropped, while a pull request was opened.",
                    "See whether it is there before you repeat.",
                ) from error
            if told := explain_hub(error, self.repo_id):
                raise told from error
            raise
