"""A Hub repository that is written to: one commit at a time, and patience where the Hub fails for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from selfpruner_hub.errors import HubError, UserError
from selfpruner_hub.models.hub_errors import explain_hub, may_have_committed, pause

PAUSES = (2.0, 8.0)
"""Pauses before the second and the third try, in seconds: the Hub's client retries uploads itself, but not commits."""
Tree = dict[str, RepoFile]
"""Files of a repository, by path."""
Changes = tuple[dict[str, Path | bytes], list[str]]
"""Files to write, by path, and paths of files to delete."""
CommitMessage = tuple[str, str | None]
"""Message of a commit, one line, and the text below it."""
Returned = TypeVar("Returned")


class Commit(NamedTuple):
    """A commit, or the newest one where there was nothing to change."""

    url: str
    """Address of the repository, or of the pull request."""
    oid: str
    changed: bool
    """Whether a commit was made."""


def same_content(path: Path, remote: RepoFile) -> bool:
    """Return whether a file equals a file of a repository, by the hash that the Hub stores."""
    if remote.lfs is None:
        return git_hash(path.read_bytes()) == remote.blob_id
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == remote.lfs.sha256


class Repository:
    """A Hub repository to write to: temporary failures are retried, others raise one of this package's errors.

    Args:
        api: Client of the Hub.
        repo_id: Name, with or without its namespace; `create` completes it.
        kind: `"model"` or `"space"`.
        revision: Branch; None is the main branch.
    """

    def __init__(self, api: HfApi, repo_id: str, kind: str, revision: str | None = None) -> None:
        if not isinstance(repo_id, str):
            raise UserError(
                f"A repository has a name, such as OWNER/NAME; got {repo_id!r}.", "Give the name of one on the Hub."
            )
        self.api = api
        self.repo_id = repo_id
        self.kind = kind
        self.revision = revision
        self.content: tuple[str, ...] = ()
        """Paths of the files after the last commit."""

    def create(self, private: bool | None, sdk: str | None = None) -> bool:
        """Create the repository if missing; a Space with its SDK. Return whether it is private."""
        self.repo_id = self._patiently(
            lambda: (
                self.api.create_repo(
                    self.repo_id, repo_type=self.kind, private=private, space_sdk=sdk, exist_ok=True
                ).repo_id
            )
        )
        info = self._patiently(lambda: self.api.repo_info(self.repo_id, repo_type=self.kind))
        if private and not info.private:
            raise UserError(
                f"{self.repo_id} is there already, and public.",
                "Make it private in its settings on the Hub, or choose another name.",
            )
        return bool(info.private)

    def read(self, name: str) -> Path | None:
        """Download a file, and return its local path; None where the repository, its branch or the file is missing."""

        def fetch() -> Path | None:
            try:
                head = self.api.repo_info(self.repo_id, repo_type=self.kind, revision=self.revision).sha
                return Path(self.api.hf_hub_download(self.repo_id, name, repo_type=self.kind, revision=head))
            except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError):
                return None

        return self._patiently(fetch)

    def commit(self, changes: Callable[[Tree], Changes], message: CommitMessage, create_pr: bool = False) -> Commit:
        """Commit the changes to the current content, if there are any; the branch is created if missing.

        Args:
            changes: Function from the current content to the changes.
            message: Message of the commit.
            create_pr: Whether to open a pull request instead.

        Returns:
            The commit.
        """
        branch = self.revision
        if branch and not create_pr and not branch.startswith("refs/"):
            self._patiently(lambda: self._create_branch(branch))
        return self._patiently(lambda: self._commit(changes, message, create_pr), once=create_pr)

    def _create_branch(self, branch: str) -> None:
        self.api.create_branch(self.repo_id, branch=branch, repo_type=self.kind, exist_ok=True)

    def _commit(self, changes: Callable[[Tree], Changes], message: CommitMessage, create_pr: bool) -> Commit:
        head = self.api.repo_info(self.repo_id, repo_type=self.kind, revision=self.revision).sha
        entries = self.api.list_repo_tree(self.repo_id, repo_type=self.kind, revision=head, recursive=True)
        tree = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        files, stale = changes(tree)
        self.content = tuple({*tree, *files} - {*stale})
        commit = self.api.create_commit(
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
        url = commit.pr_url or f"{self.api.endpoint}/{prefix}{self.repo_id}"
        return Commit(url, commit.oid, commit.oid != head)

    def _patiently(self, call: Callable[[], Returned], once: bool = False) -> Returned:
        """Call, and retry after temporary failures; with `once`, not where the first call may have succeeded."""
        with self._explained(once):
            for wait in PAUSES:
                try:
                    return call()
                except Exception as error:  # the Hub's client raises many kinds
                    hub_wait = pause(error)
                    if hub_wait is None or (once and may_have_committed(error)):
                        raise
                time.sleep(max(wait, hub_wait))
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
            if explanation := explain_hub(error, self.repo_id):
                raise explanation from error
            raise
