"""The static Space in Chromium: what the pruned model and its parent answer in a browser, and how fast.

Run: python benchmarks/browser.py WORK DENSE PRUNED MODULES
WORK keeps a copy of PRUNED with its graphs and the parent's; DENSE and PRUNED are directories of saved models. MODULES
is a `node_modules` with the version of @huggingface/transformers that the page loads. Needs Chromium and Playwright.
"""

from __future__ import annotations

import mimetypes
import re
import shutil
import statistics
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCard
from protocol import Rows, write

from selfpruner_hub.hub.exports import make_exports
from selfpruner_hub.hub.space import static_files
from selfpruner_hub.storage.model_record import read_record

CDN = "https://cdn.jsdelivr.net/npm/"
GRAPHS = "me/model-ONNX"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += [f"--disable-{what}" for what in ("background-networking", "component-update", "sync")]
PATIENCE = 600_000
"""Milliseconds that the page may take."""
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
DTYPES, TOKENS, PASSES = ("q8", "q4"), 32, 3
PROMPTS = ("What is the capital of France?", "Write a short story about a fox.")
"""One with a short answer, and one with a long one, which tells more of the speed."""


def chromium() -> str | None:
    """Find a Chromium that is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class _Files(SimpleHTTPRequestHandler):
    """Serves files with the headers that a Space asks for."""

    headers_of_the_space: dict[str, str] = {}  # noqa: RUF012

    def end_headers(self) -> None:
        for name, value in self.headers_of_the_space.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def published(model: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Serve the static Space of a model on the loopback, as the Hub would.

    Args:
        model: Directory of a saved model with its graphs and those of its parent in `onnx/`.
        root: Empty directory for the files.

    Yields:
        Address of the page, and the directory of the graphs.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(root))) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        for name, source in static_files(read_record(model), GRAPHS, url).items():
            (root / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
        graphs = shutil.copytree(model / "onnx", root / GRAPHS / "resolve" / "main")
        _Files.headers_of_the_space = SpaceCard.load(root / "README.md").data.to_dict()["custom_headers"]
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a browser may hang up
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield url, graphs
        finally:
            server.shutdown()


@contextmanager
def opened(browser: Any, url: str, modules: Path) -> Iterator[tuple[Any, list[str]]]:
    """Open the page and wait until it is ready. What it asks of the CDN comes from npm's files.

    Args:
        browser: Playwright's browser.
        url: Address of the page.
        modules: A `node_modules` with Transformers.js.

    Yields:
        Playwright's page, and a list that fills with what the browser complains of: errors, and requests to others.
    """
    complaints: list[str] = []

    def library(route: Any) -> None:
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
    page.on("request", lambda r: None if r.url.startswith((url, CDN, "data:", "blob:")) else complaints.append(r.url))
    page.goto(url)
    page.wait_for_function("document.querySelector('#where').textContent.startsWith('Runs on')")
    try:
        yield page, complaints
    finally:
        context.close()


def ask(page: Any, prompt: str, tokens: int, dtype: str = "q8") -> dict[str, dict[str, Any]]:
    """Send a prompt, and wait for both answers: `text`, and `rate` in tokens a second, by the name of the model."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Longest answer, in tokens").fill(str(tokens))
    page.get_by_label("Weights").select_option(dtype)
    page.get_by_role("button", name="Compare").click()
    page.wait_for_function("!document.querySelector('#compare').disabled")
    answers = {}
    for which in ("pruned", "dense"):
        took = page.locator(f"#{which}-took").inner_text()
        rate = re.match(r"([\d.]+) tokens/s", took)
        text = page.locator(f"#{which}").text_content()
        answers[which] = {"text": text.strip(), "rate": float(rate[1]) if rate else None, "took": took}
    return answers


def main(work: Path, dense: Path, pruned: Path, modules: Path) -> None:
    """Ask plain questions in every dtype; write answers and medians of the rates."""
    from playwright.sync_api import sync_playwright

    rows, model = Rows(work / "rows.jsonl"), work / pruned.name
    if not model.exists():
        shutil.copytree(pruned, model)
        make_exports(model, [], static=True, parent=str(dense))
    shutil.rmtree(work / "page", ignore_errors=True)
    (work / "page").mkdir()
    with published(model, work / "page") as (url, _), sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium(), args=FLAGS)
        with opened(browser, url, modules) as (page, complaints):
            where = page.locator("#where").inner_text()
            for dtype in DTYPES:
                for prompt in PROMPTS:
                    if not rows.have(dtype=dtype, prompt=prompt):
                        passes = [ask(page, prompt, TOKENS, dtype) for _ in range(PASSES)]
                        rows.keep({"dtype": dtype, "prompt": prompt, **_row(passes)})
        browser.close()
    if complaints:
        sys.exit("\n".join(complaints))
    write(
        "browser",
        f"{read_record(model).base_model} and its pruned model ({pruned.name}, β = {read_record(model).beta:g}) on the "
        f"page of `push --space static`, in headless Chromium: {where} At most {TOKENS} tokens after a prompt, one "
        f"model after the other; tokens a second after the first one, medians of {PASSES} passes (none where a model "
        "ends at once); ratio: of neighbouring passes",
        list(rows),
    )


def _row(passes: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Answers of the last pass, and medians."""
    texts = {which: passes[-1][which]["text"] for which in ("pruned", "dense")}
    rates = {which: [each[which]["rate"] for each in passes] for which in texts}
    if None in (*rates["pruned"], *rates["dense"]):
        return texts
    ratios = [a / b for a, b in zip(rates["pruned"], rates["dense"], strict=True)]
    medians = {f"{which}_tokens_per_s": statistics.median(values) for which, values in rates.items()}
    return {"ratio": round(statistics.median(ratios), 3), **medians, **texts}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
