"""A pruned model and its dense parent on one prompt, side by side, with the speed of each measured live.

Runs from a published model alone: set PRUNED_MODEL to a Hub repository or a directory made with selfpruner-hub, and
DENSE_MODEL to another parent than the one its record names. Nothing that a user types is kept or logged.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import gradio as gr
import pandas as pd
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

PRUNED = os.environ.get("PRUNED_MODEL", "")
LONGEST_PROMPT = 2_000
"""Characters."""
MOST_TOKENS = 256
SECONDS = 60
"""Longest that one model may write."""


@cache
def record() -> dict:
    """What `selfpruner.json` of the pruned model says."""
    local = Path(PRUNED, "selfpruner.json")
    path = local if local.is_file() else hf_hub_download(PRUNED, "selfpruner.json")
    return json.loads(Path(path).read_text(encoding="utf-8"))


@cache
def load(which: str) -> tuple:
    """The model `pruned` or `dense`, with the pruned model's tokenizer (it is the parent's)."""
    name = PRUNED if which == "pruned" else os.environ.get("DENSE_MODEL") or record()["base_model"]
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=which == "pruned", dtype="auto").eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(PRUNED)


def write(which: str, prompt: str, tokens: int) -> Iterator[tuple[str, str]]:
    """Stream (text so far, what it took so far)."""
    try:
        model, tokenizer = load(which)
    except Exception as error:  # a visitor can do nothing about it, but should see which model is missing
        yield "", f"The {which} model cannot be loaded ({type(error).__name__})."
        return
    text = prompt
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=SECONDS)
    settings = {"max_new_tokens": tokens, "do_sample": False, "max_time": SECONDS, "streamer": streamer}
    started, first, written = time.perf_counter(), None, ""
    threading.Thread(target=model.generate, kwargs={**inputs, **settings}, daemon=True).start()
    for piece in streamer:
        first = first or time.perf_counter() - started
        written += piece
        count = len(tokenizer(written, add_special_tokens=False)["input_ids"])
        rate = count / (time.perf_counter() - started)
        yield written, f"{rate:.1f} tokens/s · first token after {first:.2f} s · {count} tokens"


def compare(prompt: str, tokens: int) -> Iterator[tuple[str, str, str, str]]:
    """Let the pruned model answer, then its parent: one at a time, so that neither slows the other."""
    if not prompt.strip():
        raise gr.Error("Type a prompt first.")
    if len(prompt) > LONGEST_PROMPT:
        raise gr.Error(f"The prompt has {len(prompt)} characters; at most {LONGEST_PROMPT} are taken.")
    left = ("", "")
    for left in write("pruned", prompt, int(tokens)):
        yield *left, "", "waiting for the pruned model"
    for right in write("dense", prompt, int(tokens)):
        yield *left, *right


def build() -> gr.Blocks:
    """The page."""
    known = record()
    smaller = 100 * (1 - known["parameters"]["pruned"] / known["parameters"]["dense"])
    rates = pd.DataFrame({"layer": range(1, len(known["rates"]) + 1), "removed": [100 * r for r in known["rates"]]})
    with gr.Blocks(title="Pruned beside its parent") as page:
        gr.Markdown(f"# {known['base_model']}, {smaller:.0f} % smaller\nThe same prompt, answered by both.")
        prompt = gr.Textbox(label="Prompt", value="What is the capital of France?", lines=3, max_length=LONGEST_PROMPT)
        tokens = gr.Slider(8, MOST_TOKENS, value=64, step=8, label="Longest answer, in tokens")
        button = gr.Button("Compare", variant="primary")
        with gr.Row():
            with gr.Column():
                pruned = gr.Textbox(label=f"Pruned: {known['parameters']['pruned']:,} parameters", lines=8)
                pruned_took = gr.Markdown()
            with gr.Column():
                dense = gr.Textbox(label=f"Dense: {known['parameters']['dense']:,} parameters", lines=8)
                dense_took = gr.Markdown()
        gr.BarPlot(rates, x="layer", y="removed", title="Removed from each layer, %")
        gr.on([button.click, prompt.submit], compare, [prompt, tokens], [pruned, pruned_took, dense, dense_took])
    return page.queue(default_concurrency_limit=1, max_size=20)


if __name__ == "__main__":
    if not PRUNED:
        raise SystemExit("Set PRUNED_MODEL to a model made with selfpruner-hub (a Hub repository or a directory).")
    build().launch()
