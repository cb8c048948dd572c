"""The app on tiny models, and the browser that the tests of pages share."""

import importlib
import sys

import pytest
from browser import FLAGS, chromium
from support.tiny import save_tiny

from selfpruner_hub.storage.layout import asset

SPACE = asset("spaces")
MODULES = [
    ".".join(path.relative_to(SPACE).with_suffix("").parts).removesuffix(".__init__") for path in SPACE.rglob("*.py")
]


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("space") / "dense")


@pytest.fixture
def space(saved_models, dense, monkeypatch):
    """Import the Space's modules anew, for the model `first`; gives back one by its name."""
    pytest.importorskip("gradio", reason='needs pip install -e ".[space]"')
    monkeypatch.setenv("PRUNED_MODEL", str(saved_models / "first"))
    monkeypatch.setenv("DENSE_MODEL", str(dense))
    monkeypatch.syspath_prepend(str(SPACE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def browser():
    if chromium() is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()
