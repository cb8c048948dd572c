"""The files of a demo Space: the app of `spaces/`, the name of its model, and this package for the tab that prunes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCard

from selfpruner_hub.hub.card import answered
from selfpruner_hub.models.loading import is_repo_id
from selfpruner_hub.storage.layout import asset
from selfpruner_hub.storage.model_record import Record

VENDORED = ("selfpruner_hub", "exporters")
"""Packages that are copied into a Space. Its `requirements.txt` cannot name this package before it is on an index: a
requirement that pip does not find stops the build of the Space."""
APP_MODEL_FILE = "model.json"
"""Name of the file that the app reads: the model, its revision, its dense parent, and its export."""
REQUIREMENTS = "requirements.txt"
GGUF, GRAPHS = "gguf", "graphs"
"""Keys of `APP_MODEL_FILE` for the export that a Space runs: a file of the model's repository, or one of graphs."""
RUNTIMES = {
    GGUF: ("xllamacpp>=2026.10",),
    GRAPHS: ("onnx>=1.23,<2", "onnxscript>=0.7.2,<0.8", "onnxruntime>=1.32,<2"),
}
"""Requirements of a Space that runs an export, by its kind; the same as in this package's extras `gguf` and `onnx`."""
DENSE = "dense"
"""Folder, beside a model's graphs, of the graphs of its dense parent, which a static Space compares it with."""
_CARRIED = ("*.py", "templates/*.txt")
METADATA = "selfpruner_hub.dist-info/METADATA"
"""Name of the file in a Space by which `importlib.metadata` knows the version of the package that is carried."""


def gguf_of(names: Iterable[str]) -> str | None:
    """Choose the GGUF file that a demo runs: with several dtypes the first by name, which is a float's.

    Args:
        names: Paths of the files in the model's directory or repository.

    Returns:
        Path of the file; None where there is none.
    """
    return min((name for name in names if fnmatch(name, "gguf/model-*.gguf")), default=None)


def space_files(
    record: Record,
    repo_id: str,
    revision: str | None = None,
    export: tuple[str, str] | None = None,
    commit: str = "",
) -> dict[str, Path | bytes]:
    """Collect the files of a Space that shows one published model.

    Args:
        record: Record of the model.
        repo_id: Hub repository of the model.
        revision: Branch of the model; None is the main branch.
        export: Export that the Space runs: `GGUF` and the file's path in the repository, or `GRAPHS` and the
            repository of the graphs. None runs PyTorch.
        commit: Commit of the model. Nothing reads it: a Space restarts, and so loads the new model, where a file has
            changed.

    Returns:
        Files by their path in the Space.
    """
    app = asset("spaces")
    paths = (path for pattern in ("*.py", "engines/*.py", REQUIREMENTS) for path in app.glob(pattern))
    files: dict[str, Path | bytes] = {path.relative_to(app).as_posix(): path for path in paths}
    settings = {"pruned": repo_id, "revision": revision, "dense": record.base_model, "commit": commit}
    if export is not None:
        kind, where = export
        settings[kind] = where
        needed = [(app / REQUIREMENTS).read_text(encoding="utf-8").rstrip(), *RUNTIMES[kind]]
        files[REQUIREMENTS] = "\n".join([*needed, ""]).encode()
    files[APP_MODEL_FILE] = f"{json.dumps(settings, indent=2)}\n".encode()
    files["README.md"] = _front_page(app / "README.md", record, repo_id).encode()
    files[METADATA] = f"Metadata-Version: 2.1\nName: selfpruner-hub\nVersion: {version('selfpruner-hub')}\n".encode()
    for name in VENDORED:
        package = _folder(name)
        paths = (path for pattern in _CARRIED for path in package.rglob(pattern))
        paths = (path for path in paths if app not in path.parents)  # a wheel has the app inside the package
        files |= {f"{name}/{path.relative_to(package).as_posix()}": path for path in paths}
    return files


def static_files(record: Record, graphs: str, host: str, revision: str | None = None) -> dict[str, Path | bytes]:
    """Collect the files of a static Space, which runs a published model and its parent in the visitor's browser.

    Args:
        record: Record of the model.
        graphs: Hub repository of its graphs, and of its parent's in the folder `DENSE`.
        host: Address of the Hub.
        revision: Branch of the graphs; None is the main branch.

    Returns:
        Files by their path in the Space.
    """
    page = asset("spaces") / "static"
    files: dict[str, Path | bytes] = {path.name: path for path in page.iterdir() if path.is_file()}
    name = record.base_model.rpartition("/")[2]
    sentences = [
        f"The same prompt, answered in your browser by {name} and by a copy that lost "
        f"{100 * record.achieved_beta:.0f} % of its layers' weights {record.treatment}. Nothing that you type "
        "leaves your machine.",
        answered(record.metrics),
    ]
    settings = {
        "graphs": graphs,
        "revision": revision,
        "host": f"{host.rstrip('/')}/",
        "title": f"{name}, {100 * (1 - record.parameters['pruned'] / record.parameters['dense']):.0f} % smaller",
        "about": " ".join(filter(None, sentences)),
        "parameters": record.parameters,
    }
    files[APP_MODEL_FILE] = f"{json.dumps(settings, indent=2)}\n".encode()
    files["README.md"] = _front_page(page / "README.md", record, graphs).encode()
    return files


def _folder(package: str) -> Path:
    """Return the folder of a package without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No package named {package!r}.", name=package)
    return Path(spec.origin).parent


def _front_page(template: Path, record: Record, repo_id: str) -> str:
    """Return the Space's README with its metadata filled in."""
    card = SpaceCard(template.read_text(encoding="utf-8"))
    data: Any = card.data  # its fields are created by assignment
    data.title = f"{repo_id.rpartition('/')[2]} beside its parent"
    data.models = [repo_id, *([record.base_model] if is_repo_id(record.base_model) else [])]
    return str(card)
