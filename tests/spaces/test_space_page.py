"""The demo Space in a browser, with the real model: what a visitor does, on a desktop and on a phone.

SCREENSHOTS=directory keeps pictures of every step, to be looked at.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.space_load import visit
from support.tiny import tiny_model, tiny_tokenizer
from support.trained import VOCABULARY, trained_tokenizer
from transformers import GenerationConfig

from exporters.export import export
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage.model_record import read_record

pytestmark = pytest.mark.slow
SECRET = "a walrus called Bartholomew"
"""Typed by a visitor; nothing that the app writes may hold it."""
REFUSED = "422 (Unprocessable"
"""What Chromium says of a prompt that is refused: the page tells the visitor."""
PATIENCE = 600_000
"""Milliseconds: tests share their machine."""
TINY = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_hidden_layers": 16}
"""Of a model that is tiny, but whose search takes some seconds: the page is told of it twice a second."""
FEW = {"window": 32, "calibration_tokens": 256, "fitness_tokens": 64, "evaluations": 0}
"""Settings of its pruning."""
SHORTEST = 16
"""Tokens that a model here writes at least: one that was pruned by little text may have nothing more to say."""


class Served:
    """A running page."""

    def __init__(self, directory: Path, dense: Path, home: Path) -> None:
        self.url, self.directory, self.log = "", directory, home / "log.txt"
        variables = {
            **{key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ},
            **{"HOME": str(home), "DENSE_MODEL": str(dense), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin take a busy machine's last core
            "GRADIO_TEMP_DIR": str(home / "gradio"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "selfpruner_hub.cli", "demo", str(directory)],
                env=variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until gradio, which takes the first free port, says where the page is."""
        deadline = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < deadline and self.process.poll() is None:
            if said := re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text()):
                self.url = said[0]
                return
            time.sleep(0.5)
        pytest.fail(f"the page did not come up:\n{self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)  # whoever starts tests in the background has them ignore SIGINT
        self.process.wait()


def serve(model, tokenizer, pruned, home, gguf=""):
    """Save a dense model, copy its pruned model, export that to GGUF if a dtype is given, and open the page on them."""
    model.save_pretrained(home / "dense")
    tokenizer.save_pretrained(home / "dense")
    shutil.copytree(pruned, home / "pruned")
    for name in ("dense", "pruned"):
        GenerationConfig.from_pretrained(home / name, min_new_tokens=SHORTEST).save_pretrained(home / name)
    if gguf:
        export(home / "pruned", "gguf", home / "pruned" / "gguf", dtype=gguf)
    served = Served(home / "pruned", home / "dense", home)
    served.wait()
    return served


@pytest.fixture(scope="module")
def served(real_pruner, real_pruned, tmp_path_factory):
    pytest.importorskip("gradio", reason='needs pip install -e ".[space]"')
    served = serve(real_pruner.model, real_pruner.tokenizer, real_pruned / "model", tmp_path_factory.mktemp("page"))
    yield served
    served.stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The page with a tiny model, whose GGUF file runs in llama.cpp."""
    pytest.importorskip("gradio", reason='needs pip install -e ".[space]"')
    pytest.importorskip("xllamacpp", reason='needs pip install -e ".[gguf]"')
    home, model, tokenizer = tmp_path_factory.mktemp("tiny"), tiny_model("llama", **TINY), trained_tokenizer()
    pruned = AutoPruner(model, tokenizer, "tests/llama").prune(0.3, data="self", progress=False, **FEW)
    pruned.save_pretrained(home / "saved")
    served = serve(model, tokenizer, home / "saved", home, gguf="f16")
    yield served
    served.stop()


@pytest.fixture
def open_page(browser):
    """Open a page in a window of some kind; complains of whatever the browser complains of."""
    opened = []

    def open_page(served, width=1280, height=900, scheme="light"):
        phone = width < 500
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, is_mobile=phone, has_touch=phone
        )
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        complaints = []
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" and REFUSED not in m.text else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith((served.url, "data:", "blob:")) else complaints.append(r.url)
        )
        page.goto(served.url)
        page.get_by_role("button", name="Compare").wait_for()
        opened.append((context, complaints))
        return page

    yield open_page
    for context, complaints in opened:
        context.close()
        assert not complaints


@pytest.fixture
def visit_page(open_page, served):
    """Open the page with the real model."""
    return functools.partial(open_page, served)


def picture(page, name):
    if directory := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)


def text_of(page, name):
    return page.locator(f"#{name} textarea").input_value()


def watch_answers(page):
    """Lengths of both answers as they grow, until the verdict stands there."""
    lengths: list[tuple[int, int]] = []
    deadline, done = time.monotonic() + PATIENCE / 1000, False
    while not done:
        assert time.monotonic() < deadline
        done = "speed of its parent" in page.locator("#verdict").inner_text()  # then once more: a tiny model is quick
        now = (len(text_of(page, "pruned")), len(text_of(page, "dense")))
        if not lengths or now != lengths[-1]:
            lengths.append(now)
        page.wait_for_timeout(50)
    return lengths


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def test_both_answers_stream_one_after_the_other(visit_page):
    page = visit_page()
    page.get_by_label("Prompt").fill(f"Tell me about {SECRET}.")
    slider = page.get_by_label("number input for Longest answer, in tokens")
    slider.fill("40")
    slider.press("Tab")
    page.get_by_role("button", name="Compare").click()
    lengths = watch_answers(page)
    picture(page, "answers")
    pruned, dense = ([length for length, _ in lengths], [length for _, length in lengths])
    assert len(set(pruned)) > 4
    assert len(set(dense)) > 4
    assert all(first == max(pruned) for first, second in lengths if second)  # neither slows the other
    for name in ("pruned", "dense"):
        took = page.locator(f"#{name}-took").inner_text()
        assert "tokens/s" in took
        assert "first token after" in took
        assert int(re.search(r"(\d+) tokens · PyTorch, \w+, \d threads?$", took)[1]) <= 40


def test_the_length_of_the_answer(visit_page):
    page = visit_page()
    number = page.get_by_label("number input for Longest answer, in tokens")
    number.fill(str(SHORTEST))
    number.press("Tab")
    page.get_by_label("Prompt").press("Shift+Enter")  # no mouse needed
    watch_answers(page)
    assert page.locator("#pruned-took").inner_text().count(f" {SHORTEST} tokens · PyTorch, ") == 1
    assert page.locator("#dense-took").inner_text().count(f" {SHORTEST} tokens · PyTorch, ") == 1


def test_an_example_fills_the_prompt(visit_page):
    page = visit_page()
    page.get_by_role("button", name="How many days are in a normal year?").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('normal year')")


def test_stop(visit_page):
    page = visit_page()
    page.get_by_label("number input for Longest answer, in tokens").fill("256")
    page.get_by_label("Prompt").fill("Write a very long story about the sea.")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_function("document.querySelector('#pruned textarea').value.length > 20")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(1500)
    length = len(text_of(page, "pruned"))
    page.wait_for_timeout(2000)
    assert len(text_of(page, "pruned")) == length


@pytest.mark.parametrize(("width", "name"), [(1280, "desktop"), (390, "phone")])
def test_a_prompt_that_is_too_long(width, name, visit_page):
    page = visit_page(width)
    page.get_by_label("Prompt").fill("word " * 500)
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("The prompt has 2,500 characters; at most 2,000 are taken. Shorten it.").wait_for()
    picture(page, f"too-long-{name}")
    assert text_of(page, "pruned") == ""


@pytest.mark.parametrize(
    ("width", "scheme", "name"),
    [(1280, "light", "desktop"), (390, "light", "phone"), (1280, "dark", "dark"), (390, "dark", "phone-dark")],
)
def test_the_plots(width, scheme, name, visit_page, served):
    page = visit_page(width, scheme=scheme)
    picture(page, f"compare-{name}")
    tab(page, "What was cut")
    said = page.get_by_role("table").inner_text().split()
    left = read_record(served.directory).parameters["pruned"]
    assert said[:5] == ["dense", "pruned", "parameters", "134,515,008", f"{left:,}"]
    for plot in ("rates", "search", "plans"):
        page.locator(f"#{plot} canvas, #{plot} svg.marks").first.wait_for()
    chart = page.locator("#rates canvas, #rates svg.marks").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.7)  # interactive: it tells what it shows
    if width > 500:
        page.locator("#vg-tooltip-element").get_by_text("removed").first.wait_for()
    picture(page, f"plots-{name}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    tab(page, "Prune")
    page.get_by_role("button", name="Prune").wait_for()
    picture(page, f"prune-{name}")


def test_every_control_has_a_name(visit_page):
    page = visit_page()
    for name in ("Compare", "What was cut", "Prune"):
        tab(page, name)
        page.wait_for_timeout(300)
        unnamed = page.evaluate(UNNAMED)
        assert not unnamed, unnamed


UNNAMED = """() => [...document.querySelectorAll('main input, main textarea, main button, main select')]
  .filter(e => e.offsetParent && !(e.labels?.length || e.ariaLabel || e.title || e.innerText?.trim() || e.alt
                                   || e.getAttribute('aria-labelledby')))
  .map(e => e.outerHTML.slice(0, 200))"""


def test_pruning_live(open_page, tiny):
    page = open_page(tiny)
    tab(page, "Prune")
    page.get_by_label("number input for β: mean fraction of weights to remove").fill("0.2")
    number = page.get_by_label("number input for Length of the search, in evaluations")
    number.fill("16")
    number.press("Tab")
    page.get_by_role("button", name="Prune").click()
    page.wait_for_function("document.querySelector('#standing').innerText.includes('best so far')")
    picture(page, "prune-during")
    page.locator("#live-search").wait_for()  # shown while it goes on
    page.wait_for_function("document.querySelector('#standing').innerText.includes('Done in')")
    picture(page, "prune-done")
    dense = read_record(tiny.directory).parameters["dense"]
    told = re.search(r"([\d,]+) → ([\d,]+)", page.locator("#standing").inner_text())
    before, after = (int(number.replace(",", "")) for number in told.groups())
    assert before == dense > after
    page.locator("#live-rates canvas, #live-rates svg.marks").first.wait_for()


def test_what_a_visitor_types_is_kept_nowhere(visit_page, served):
    page = visit_page()
    page.get_by_label("Prompt").fill(f"{SECRET} " * 100)
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("are taken. Shorten it.").wait_for()
    assert SECRET not in served.log.read_text()
    for path in served.log.parent.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert SECRET.encode() not in path.read_bytes(), path
    assert "Traceback" not in served.log.read_text()


def test_a_gguf_file_answers_in_llama_cpp(open_page, tiny):
    """The parent too, which the page converts itself."""
    page = open_page(tiny)
    page.get_by_label("number input for Longest answer, in tokens").fill("64")
    page.get_by_label("Prompt").fill("The quick brown fox")
    page.get_by_label("Prompt").press("Shift+Enter")
    lengths = watch_answers(page)
    picture(page, "llama.cpp")
    for name, seen in zip(("pruned", "dense"), zip(*lengths, strict=True), strict=True):
        took = page.locator(f"#{name}-took").inner_text()
        assert re.fullmatch(r"[\d.]+ tokens/s · first .* · \d+ tokens · llama\.cpp, f16, \d+ threads?", took)
        assert max(seen) > 0
    assert "PyTorch" not in page.locator("#verdict").inner_text()


def test_ten_visitors_at_once(saved_models, tmp_path):
    """A short one, on a tiny model; `python tests/support/space_load.py` does the same for as long as one likes."""
    pytest.importorskip("gradio_client", reason='needs pip install -e ".[space]"')
    served = serve(tiny_model("llama"), tiny_tokenizer(), saved_models / "first", tmp_path)
    try:
        visit(served.url, served.process.pid, users=10, seconds=1, tokens=16)  # warms up
        load = visit(served.url, served.process.pid, users=10, seconds=5, tokens=16)
    finally:
        served.stop()
    assert load.errors == []
    assert load.answers >= 10
    assert load.growth() < 20e6
