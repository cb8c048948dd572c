"""Transformers.js for the tests, from npm."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from selfpruner_hub.storage.layout import asset

PACKAGE = "@huggingface/transformers"


def version() -> str:
    """The version that the static Space loads."""
    worker = (asset("spaces") / "static" / "worker.js").read_text(encoding="utf-8")
    return re.search(rf"{PACKAGE}@([\d.]+)/", worker)[1]


@functools.cache
def transformers_js() -> Path:
    """A folder whose `node_modules` has that version; installed once, into the folder of TRANSFORMERS_JS or a cache.

    Skips the test where it cannot be had.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(os.environ.get("TRANSFORMERS_JS", cache / "selfpruner-hub" / f"transformers.js-{version()}"))
    if (folder / "node_modules" / PACKAGE / "package.json").is_file():
        return folder
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip(f"needs Node and npm, or {PACKAGE} in the folder of TRANSFORMERS_JS")
    folder.mkdir(parents=True, exist_ok=True)
    words = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", f"{PACKAGE}@{version()}"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm does not install {PACKAGE}: {done.stderr.strip()[-200:]}")
    return folder
