"""The static Space in Chromium: both models in the browser, weights from the loopback, the library from npm's files."""

from __future__ import annotations

import re
import shutil

import onnx
import pytest
import torch
from browser import ask, opened, published
from support.javascript import transformers_js

from selfpruner_hub.models.loading import load_model
from selfpruner_hub.storage.model_record import read_record

pytestmark = pytest.mark.slow
PROMPT = "the quick brown fox"
MISSING = "dense/model_q4.onnx"
"""File that a test takes away; the library complains of it on the console."""


@pytest.fixture(scope="module")
def model(saved_graphs, tmp_path_factory):
    """A saved model with its graphs, and those of its parent."""
    return shutil.copytree(saved_graphs / "model", tmp_path_factory.mktemp("static") / "model")


def test_graphs_of_the_parent(model):
    files = {path.name for path in (model / "onnx" / "dense").iterdir()}
    graphs = {f"model{suffix}.onnx{data}" for suffix in ("_fp16", "_quantized", "_q4") for data in ("", "_data")}
    assert files == {*graphs, "selfpruner_export.json"}


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """The published page, served on the loopback as the Hub serves it."""
    with published(model, tmp_path_factory.mktemp("served")) as (url, served):
        # In 8 bits, a random model writes another text in other kernels: the graph in float32 goes by that name.
        exact = onnx.load(served / "onnx" / "model.onnx")
        for path in (served / "onnx").glob("model_quantized.onnx*"):
            path.unlink()
        name = "model_quantized.onnx"
        onnx.save(exact, served / "onnx" / name, save_as_external_data=True, location=f"{name}_data")
        yield url


@pytest.fixture
def page(address, browser):
    """The page, once it is ready. What it asks of the CDN comes from npm's files; nothing else leaves the machine."""
    with opened(browser, address, transformers_js() / "node_modules") as (page, complaints):
        yield page
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
    told = ask(page, PROMPT, 12)
    assert "the speed of its parent" in page.locator("#verdict").inner_text(), page.locator("body").inner_text()
    assert told["pruned"]["text"] == expected(model, 12).strip()
    assert told["dense"]["text"]
    for took in (told["pruned"]["took"], told["dense"]["took"]):
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
