"""The static Space in Chromium: both models in the browser, weights from the loopback, the library from npm's files."""

from __future__ import annotations

import mimetypes
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import onnx
import pytest
import torch
from huggingface_hub import SpaceCard
from support.javascript import transformers_js
from support.tiny import tiny_model
from support.trained import VOCABULARY, trained_tokenizer

from selfpruner_hub.exporting import make_exports
from selfpruner_hub.hub.space import static_files
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage.model_record import read_record

pytestmark = pytest.mark.slow
CDN = "https://cdn.jsdelivr.net/npm/"
GRAPHS = "me/tiny-ONNX"
PROMPT = "the quick brown fox"
MISSING = "dense/model_q4.onnx"
"""File that a test takes away; the library complains of it on the console."""
PATIENCE = 600_000
"""Milliseconds: tests share their machine."""
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model with its graphs, and those of its parent."""
    pytest.importorskip("onnxruntime", reason='needs pip install -e ".[onnx]"')
    home = tmp_path_factory.mktemp("static")
    dense = tiny_model("llama", vocab_size=VOCABULARY)
    dense.save_pretrained(home / "dense")
    trained_tokenizer().save_pretrained(home / "dense")
    few = {"window": 32, "calibration_tokens": 512, "fitness_tokens": 128, "evaluations": 0, "seeds": ("uniform",)}
    pruner = AutoPruner(dense, trained_tokenizer(), "tests/llama")
    pruner.prune(0.3, data="self", proposer="evolution", progress=False, **few).save_pretrained(home / "model")
    make_exports(home / "model", [], static=True, parent=str(home / "dense"))
    return home / "model"


def test_graphs_of_the_parent(model):
    files = {path.name for path in (model / "onnx" / "dense").iterdir()}
    graphs = {f"model{suffix}.onnx{data}" for suffix in ("_fp16", "_quantized", "_q4") for data in ("", "_data")}
    assert files == {*graphs, "selfpruner_export.json"}


class Page(SimpleHTTPRequestHandler):
    """The files of the Space and of the repository of graphs, with the headers that the Space asks for."""

    headers_of_the_space: dict[str, str] = {}

    def end_headers(self) -> None:
        for name, value in self.headers_of_the_space.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """The published page, served on the loopback as the Hub serves it."""
    root = tmp_path_factory.mktemp("served")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Page, directory=str(root))) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        for name, source in static_files(read_record(model), GRAPHS, url).items():
            (root / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
        shutil.copytree(model / "onnx", served := root / GRAPHS / "resolve" / "main")
        # In 8 bits, a random model writes another text in other kernels: the graph in float32 goes by that name.
        exact = onnx.load(served / "onnx" / "model.onnx")
        for path in (served / "onnx").glob("model_quantized.onnx*"):
            path.unlink()
        name = "model_quantized.onnx"
        onnx.save(exact, served / "onnx" / name, save_as_external_data=True, location=f"{name}_data")
        Page.headers_of_the_space = SpaceCard.load(root / "README.md").data.to_dict()["custom_headers"]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield url
        server.shutdown()


@pytest.fixture
def page(address, browser):
    """The page, once it is ready. What it asks of the CDN comes from npm's files; nothing else leaves the machine."""
    modules = transformers_js() / "node_modules"
    complaints = []

    def library(route):
        package, name = re.fullmatch(r"((?:@[\w-]+/)?[\w-]+)@[^/]+/(.+)", route.request.url.removeprefix(CDN)).groups()
        path = modules / package / name
        kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
        headers = {"access-control-allow-origin": "*", "cross-origin-resource-policy": "cross-origin"}
        route.fulfill(path=path, content_type=kind, headers=headers)

    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    context.route(f"{CDN}**", library)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda r: None if r.url.startswith((address, CDN, "data:", "blob:")) else complaints.append(r.url)
    )
    page.goto(address)
    page.wait_for_function("document.querySelector('#where').textContent.startsWith('Runs on')")
    yield page
    context.close()
    assert not [complaint for complaint in complaints if MISSING not in complaint]


def expected(model, tokens):
    """What PyTorch writes."""
    loaded, tokenizer = load_model(str(model), device="cpu", dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    new = loaded.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def test_both_models_answer(page, model):
    assert page.title() == f"llama, {100 - round(100 * counts(model, 'pruned') / counts(model, 'dense'))} % smaller"
    assert f"{counts(model, 'pruned'):,} parameters" in page.locator("#pruned-name").inner_text()
    assert "Runs on the processor" in page.locator("#where").inner_text()
    assert page.evaluate("crossOriginIsolated")  # so that WebAssembly may use threads
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Longest answer, in tokens").fill("12")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_function("!document.querySelector('#compare').disabled")
    assert "the speed of its parent" in page.locator("#verdict").inner_text(), page.locator("body").inner_text()
    assert page.locator("#pruned").text_content().strip() == expected(model, 12).strip()
    assert page.locator("#dense").text_content().strip()
    for which in ("pruned", "dense"):
        took = page.locator(f"#{which}-took").inner_text()
        assert re.fullmatch(r"[\d.]+ tokens/s · first token after [\d.]+ s · \d+ tokens", took), took
        assert 2 <= int(took.split("· ")[-1].split()[0]) <= 12
    assert page.get_by_role("button", name="Compare").is_enabled()


def counts(model, which):
    return read_record(model).parameters[which]


def test_a_model_that_is_not_there(page, address, model):
    """One line says so, and the page can be asked again."""
    page.route(f"**/{MISSING}", lambda route: route.fulfill(status=404))
    page.get_by_label("Weights").select_option("q4")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_function("document.querySelector('#dense-took').textContent.includes('cannot be run')")
    assert "tokens" in page.locator("#pruned-took").inner_text()
    assert page.get_by_role("button", name="Compare").is_enabled()


def test_stop(page):
    """What was written stays, and the other model is not asked."""
    page.get_by_label("Longest answer, in tokens").fill("100")
    page.evaluate(
        """() => new MutationObserver((_, watching) => {
          watching.disconnect();
          document.querySelector('#stop').click();
        }).observe(document.querySelector('#pruned'), { childList: true, characterData: true, subtree: true })"""
    )
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_role("button", name="Compare").click()
    page.wait_for_function("document.querySelector('#pruned').textContent")
    page.wait_for_function("!document.querySelector('#compare').disabled")
    assert int(page.locator("#pruned-took").inner_text().split("· ")[-1].split()[0]) < 60
    assert page.locator("#dense").text_content() == ""
    assert page.locator("#verdict").inner_text() == ""
