"""Publishing: one commit with the model, its record, plots and card, made from saved files; optionally a Space.

There is no state between two calls except the files and the content of the repository, so an interrupted call can be
repeated: large files that arrived are not sent again, and a repository that is up to date gets no commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi

from selfpruner_hub.errors import SavedModelError, SelfPrunerError, UserError
from selfpruner_hub.hub.bundle import CARD, ONNX, Bundle, collect, is_export_of, is_ours
from selfpruner_hub.hub.card import render_card, render_onnx_card
from selfpruner_hub.hub.privacy import check_private
from selfpruner_hub.hub.repository import Changes, Commit, Repository, Tree, same_content
from selfpruner_hub.hub.space import DENSE, GGUF, GRAPHS, VENDORED, gguf_of, space_files, static_files
from selfpruner_hub.models.loading import is_repo_id
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE
from selfpruner_hub.storage.layout import EXPORTS, known_export
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, Record

ONNX_ENDING = "-ONNX"
"""Ending of the name of the repository with a model's graphs, as in the Hub's onnx-community."""
SPACES = GRADIO, STATIC = ("gradio", "static")
"""Kinds of Spaces: an app on the Hub's machine, or a page that runs in the visitor's browser."""


@dataclass(frozen=True)
class Published:
    """Address of a published model."""

    url: str
    """Address of the model, or of the pull request."""
    commit: str
    changed: bool
    """Whether a commit was made: False where the repository was up to date."""
    graphs: str | None = None
    """Address of the graphs for ONNX Runtime GenAI and Transformers.js; None where none were published."""
    space: str | None = None
    """Address of the demo Space; None where none was published."""
    stale_graphs: str | None = None
    """Repository that still holds graphs of an earlier model; None where there is none."""


def is_aside(create_pr: bool, revision: str | None) -> bool:
    """Whether a commit goes into a pull request: a new one, or one that is there, by its reference."""
    return create_pr or (revision or "").startswith("refs/")


def check_request(
    *, space: bool | str, create_pr: bool, private: bool | None = None, exports: Sequence[str] = ()
) -> None:
    """Refuse options that cannot be published, before any export is made.

    Args:
        space: Kind of the Space to publish as well, one of `SPACES`; True is Gradio's, False none.
        create_pr: Whether the commit goes into a pull request.
        private: Whether the model is private; None where that is not known yet.
        exports: Formats of the exports that are made first.

    Raises:
        UserError: A Space is requested together with a pull request, a static one of a private model, a format is
            unknown, or the formats are no list.
    """
    if isinstance(exports, str | bytes) or not isinstance(exports, Sequence):
        raise UserError(f"exports must be a list of formats; got {exports!r}.", 'For example exports=["gguf"].')
    if space not in (True, False, *SPACES):
        raise UserError(f"Unknown kind of Space {space!r}.", f"Choose {' or '.join(SPACES)}.")
    if space and create_pr:
        raise UserError("A Space shows a model that is there, not one in a pull request.", "Push it after the merge.")
    if "onnx" in exports and create_pr:
        raise UserError("ONNX graphs have a repository of their own, not a pull request.", "Push them after the merge.")
    for name in exports:
        known_export(name)
    if space == STATIC and private:
        raise UserError(
            "A static Space cannot read the graphs of a private model: a visitor's browser has no token.",
            "Publish a Gradio Space (--space), or a public model.",
        )


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
            a pull request.
        repo_id: Hub repository, `name` or `namespace/name`; created if missing.
        private: Visibility of a new repository; None uses the account's default. Graphs and Space are as private as
            the model is.
        revision: Branch, created if missing, or the reference of a pull request. None is the main branch.
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
        UserError: A Space is requested together with a pull request, a file holds a secret, a repository that should be
            private is public, or the Hub refuses.
        HubError: The Hub is unreachable, or fails.
    """
    directory = Path(directory)
    aside = is_aside(create_pr, revision)
    check_request(space=space, create_pr=aside, private=private)
    bundle = _collected(directory, repo_id, space, token)
    api = HfApi(token=token, library_name="selfpruner-hub")
    model = Repository(api, repo_id, "model", revision)
    private = model.create(private)  # what belongs to a model is no more public than the model
    check_request(space=space, create_pr=aside, private=private)  # one that is there may be private unasked
    graphs = Repository(api, f"{model.repo_id}{ONNX_ENDING}", "model", revision)
    if space == STATIC and graphs.create(private):
        raise UserError(
            f"{graphs.repo_id} is private, and a static Space loads its graphs in the visitor's browser.",
            "Make it public in its settings on the Hub, or publish a Gradio Space (--space).",
        )
    same = _are_of(directory, bundle.record, graphs)
    current = True if bundle.graphs and not aside else same
    linked = graphs.repo_id if current else ""
    message = (commit_message or "Publish the pruned model", commit_description)
    commit = model.commit(lambda tree: _model_changes(bundle, model, tree, linked), message, create_pr)
    published = Published(*commit, stale_graphs=graphs.repo_id if current is False else None)
    if bundle.graphs and not aside:
        published = replace(published, graphs=_publish_graphs(bundle, model, graphs, private, same is True))
    if space:
        published = replace(published, space=_publish_space(bundle, model, commit, linked, space == STATIC, private))
    return published


def _collected(directory: Path, repo_id: str, space: bool | str, token: str | bool | None) -> Bundle:
    """Collect the files of a saved model, and check that the Space can run and that no file holds a secret."""
    bundle = collect(directory)
    if space == STATIC and not bundle.has_dense_graphs:
        raise UserError(
            "A static Space runs ONNX graphs of the model and of its dense parent, which are not there.",
            "Push with --space static on the command line, which makes them.",
        )
    parent = bundle.record.base_model
    if space and space != STATIC and not is_repo_id(parent):
        raise UserError(
            f"A Gradio Space loads the dense parent from the Hub, and {parent!r} names no repository there.",
            "Prune with base_model (--base-model), the repository that the directory is a copy of.",
        )
    graphs = {f"{ONNX}/{name}": path for name, path in bundle.graphs.items()}
    files: dict[str, Path | bytes] = {**bundle.files, **graphs, CARD: render_card(bundle.record, repo_id).encode()}
    check_private(files, directory, [token if isinstance(token, str) else None])
    return bundle


def _publish_graphs(bundle: Bundle, model: Repository, graphs: Repository, private: bool, same: bool) -> str:
    """Publish the ONNX graphs in their repository, and return its address."""
    with _after_the_model("its ONNX graphs are"):
        graphs.create(private)
        message = ("Publish the ONNX graphs", None)
        return graphs.commit(lambda tree: _graph_changes(bundle, graphs, model, tree, same), message).url


def _publish_space(bundle: Bundle, model: Repository, commit: Commit, graphs: str, static: bool, private: bool) -> str:
    """Publish the Space of a commit, and return its address; `graphs` is the repository of the graphs, or empty."""
    api, revision = model.api, model.revision
    if static:
        space = Repository(api, f"{model.repo_id}-browser", "space")
        files = static_files(bundle.record, graphs, api.endpoint, revision)
    else:
        space = Repository(api, f"{model.repo_id}-demo", "space")
        files = space_files(bundle.record, model.repo_id, revision, _shown_export(model, graphs), commit.oid)
    with _after_the_model("its Space is"):
        space.create(private, STATIC if static else GRADIO)
        message = ("Publish the demo", None)
        return space.commit(lambda tree: (files, [n for n in _in(VENDORED, tree) if n not in files]), message).url


@contextmanager
def _after_the_model(subject: str) -> Iterator[None]:
    """Say in an error that the model is published; `subject` names the part that is not, with its verb."""
    try:
        yield
    except SelfPrunerError as error:
        raise type(error)(f"The model is published, {subject} not: {error.message}", error.hint) from error


def _are_of(directory: Path, record: Record, graphs: Repository) -> bool | None:
    """Return whether the graphs on the Hub are of the model in a directory; None where there are none of ours."""
    if (path := graphs.read(MODEL_RECORD_FILE)) is None:
        return None
    graphs.read(EXPORT_RECORD_FILE)  # into the same directory
    try:
        return is_export_of(path.parent, directory, record)
    except SavedModelError:
        return False


def _shown_export(model: Repository, graphs: str) -> tuple[str, str] | None:
    """Return the export that a Space runs: a GGUF file, else the repository `graphs`, unless that is empty."""
    if (path := gguf_of(model.content)) is not None:
        return GGUF, path
    return (GRAPHS, graphs) if graphs else None


def _graph_changes(bundle: Bundle, repo: Repository, model: Repository, tree: Tree, same: bool) -> Changes:
    """Return the changes that make a repository hold the graphs of this model, and no files of an earlier one.

    Graphs of the parent that only the repository has are kept if the graphs there are of the same model.
    """
    parents = _in([DENSE], tree)
    card = render_onnx_card(
        bundle.record,
        repo.repo_id,
        model.repo_id,
        bundle.graphs,
        revision=repo.revision,
        dense=DENSE if bundle.has_dense_graphs or (parents and same) else "",
        chat=bundle.chat,
    )
    files: dict[str, Path | bytes] = {**bundle.graphs, CARD: card.encode()}
    stale = [name for name in tree if is_ours(name)] + ([] if same else parents)
    return files, [name for name in stale if name not in files]


def _model_changes(bundle: Bundle, repo: Repository, tree: Tree, graphs: str) -> Changes:
    """Return the changes that make a repository hold this model, and no files of an earlier one.

    Exports that only the repository has are kept if they were made from the same weights. The card links to the
    repository `graphs`, unless that is empty.
    """
    remote = [name for name in EXPORTS if name not in bundle.exports and _in([name], tree)]
    if remote and not all(name in tree and same_content(path, tree[name]) for name, path in bundle.weights.items()):
        remote = []
    exports = [name for name in EXPORTS if name in (*bundle.exports, *remote)]
    card = render_card(
        bundle.record,
        repo.repo_id,
        repo.revision,
        pictures=list(bundle.pictures),
        exports=exports,
        graphs=graphs,
        chat=bundle.chat,
    )
    files: dict[str, Path | bytes] = {**bundle.files, **bundle.pictures, CARD: card.encode()}
    here = {*files, *_in(remote, tree)}
    return files, [name for name in tree if is_ours(name) and name not in here]


def _in(folders: Sequence[str], tree: Tree) -> list[str]:
    """Return the paths of a repository that are in one of the given folders."""
    return [name for name in tree if "/" in name and name.partition("/")[0] in folders]
