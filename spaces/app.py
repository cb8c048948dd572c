"""Demo of a pruned language model beside its dense parent: answers and speed, what was removed, and live pruning.

It needs only a published model. `model.json` (written when the Space is published) or PRUNED_MODEL names the model;
PRUNED_REVISION and DENSE_MODEL are optional. Nothing that a visitor types is stored or logged.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import answers
import charts
import engines
import gradio as gr
import live_pruning
import record_tables
from answers import LONGEST_PROMPT, MOST_TOKENS, Answer
from model_source import UnavailableError, record
from theme import CSS, theme

EXAMPLES = [
    "What is the capital of France?",
    "How many days are in a normal year?",
    "Who was the first person to walk on the Moon?",
    'Give the opposite of "hot".',
]
"""Plain questions, which a small pruned model still answers."""
FEW = 24
"""Number of tokens below which the page says that the measured rate is uncertain."""


# -- event handlers ---------------------------------------------------------------------------------------------------


def check(prompt: str, tokens: float | None) -> list[dict[str, Any]]:
    """Check prompt and length before the request is queued; an error is shown beside its control."""
    return [gr.validate(not wrong, wrong) for wrong in (_wrong(prompt), _wrong_length(tokens))]


def _wrong(prompt: str) -> str:
    if not prompt.strip():
        return "Type a prompt first."
    if len(prompt) > LONGEST_PROMPT:
        return f"The prompt has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} are taken. Shorten it."
    return ""


def _wrong_length(tokens: float | None) -> str:
    """Check the number of tokens: the slider gives at least 8, a request to the API may give any value or none."""
    return "" if tokens is not None and tokens >= 1 else f"Ask for 1 to {MOST_TOKENS} tokens."


def compare(prompt: str, tokens: float) -> Iterator[tuple[str, str, str, str, str]]:
    """Generate the answer of the pruned model, then of its parent: one at a time, so that neither slows the other."""
    if wrong := _wrong(prompt) or _wrong_length(tokens):
        raise gr.Error(wrong, print_exception=False)
    panels = {"pruned": ("", "loading the model …"), "dense": ("", "waiting for the pruned model to finish …")}
    done: dict[str, Answer] = {}
    yield *panels["pruned"], *panels["dense"], ""
    for which in panels:
        try:
            engines.load(which)
            for answer in answers.answer(which, prompt, int(tokens)):
                panels[which] = (answer.text, _took(answer))
                yield *panels["pruned"], *panels["dense"], ""
            done[which] = answer
        except UnavailableError as error:
            panels[which] = ("", f"⚠️ {error}")
            yield *panels["pruned"], *panels["dense"], ""
    verdict = _verdict(**done) if len(done) == 2 else ""
    yield *panels["pruned"], *panels["dense"], f"{verdict} {_in_pytorch()}".strip()


def _took(answer: Answer) -> str:
    slowed = " · someone is pruning here, so it is slower than usual" if live_pruning.busy.locked() else ""
    return f"{answer.took()}{slowed}"


def _verdict(pruned: Answer, dense: Answer) -> str:
    """Return a sentence that compares the rates of the two models; empty where a rate is unknown."""
    if not pruned.rate or not dense.rate:
        return ""
    few = "; so few tokens tell little" if min(pruned.tokens, dense.tokens) < FEW else ""
    ratio = pruned.rate / dense.rate
    return f"The pruned model wrote at **{ratio:.2f} ×** the speed of its parent, on this machine and this prompt{few}."


def _in_pytorch() -> str:
    """Say why an export that was published with the model is not used; empty where it is, or where there is none."""
    why = engines.why_pytorch()
    return f"Both models run in PyTorch, not in the export that was published. {why}" if why else ""


def show_pruning(beta: float, evaluations: float, proposer: str) -> Iterator[tuple[str, Any, Any]]:
    """Prune a small model, and show the state of the search."""
    run = live_pruning.PruningState()
    try:
        for run in live_pruning.prune(beta, int(evaluations), proposer):
            yield _standing(run), *_pictures(run)
    except UnavailableError as error:
        yield f"⚠️ {error}", *_pictures(run)
        return
    count = run.pruned.report.parameters
    yield (
        f"**Done in {run.seconds:.0f} s.** {count['dense']:,} → {count['pruned']:,} parameters; the best plan came "
        f"from `{run.pruned.report.proposer['best_from']}`.\n\n> {live_pruning.PROMPT}\n\n{live_pruning.sample(run)}",
        *_pictures(run),
    )


def _pictures(run: live_pruning.PruningState) -> tuple[Any, Any]:
    """Return the updated plots of the search and of its best plan; hidden while there are no scores."""
    plans, rates = record_tables.scored(run.journal), live_pruning.removed_by_best(run)
    there = len(plans) > 0
    return (
        gr.update(value=plans, visible=there, **charts.limits(plans)),
        gr.update(value=rates, visible=there, sort=charts.layer_order(rates)),
    )


def _standing(run: live_pruning.PruningState) -> str:
    filled = round(20 * run.share)
    bar = f"`{'█' * filled}{'░' * (20 - filled)}`"
    plan = live_pruning.best(run)
    best = f" · best so far **{plan[1]:.4f}**" if plan else ""
    return f"{bar} {run.stage} · {run.seconds:.0f} s{best}"


# -- the page ---------------------------------------------------------------------------------------------------------


def build() -> gr.Blocks:
    """Build the page; where there is no model to show, it says why."""
    try:
        headline, sentence = record_tables.title()
    except UnavailableError as error:
        with gr.Blocks(title="No model yet") as page:
            gr.Markdown(f"# There is no model to show yet\n\n{error}")
        return page
    with gr.Blocks(title=headline) as page:
        gr.Markdown(f"# {headline}\n\n{sentence}", elem_id="headline")
        with gr.Tab("Compare"):
            _compare_tab()
        with gr.Tab("What was cut"):
            _facts_tab()
        with gr.Tab("Prune"):
            _live_tab()
    return page.queue(max_size=32, default_concurrency_limit=1)


def _compare_tab() -> None:
    count = record()["parameters"]
    prompt = gr.Textbox(
        label="Prompt",
        info=f"Up to {LONGEST_PROMPT:,} characters. Shift + Enter sends it.",
        value=EXAMPLES[0],
        lines=3,
        max_lines=8,
        elem_id="prompt",
    )
    gr.Examples(EXAMPLES, prompt, label="Examples")
    tokens = gr.Slider(8, MOST_TOKENS, value=64, step=8, label="Longest answer, in tokens", elem_id="tokens")
    button, stop = _buttons("Compare", "compare")
    outputs = []
    with gr.Row():
        for which in ("pruned", "dense"):
            with gr.Column(min_width=300):
                label = f"{which.capitalize()}: {count[which]:,} parameters"
                outputs.append(gr.Textbox(label=label, lines=7, max_lines=16, elem_id=which))
                outputs.append(gr.Markdown("", elem_classes="took", elem_id=f"{which}-took"))
    outputs.append(gr.Markdown("", elem_classes="took", elem_id="verdict"))
    running = gr.on(
        [button.click, prompt.submit],
        compare,
        [prompt, tokens],
        outputs,
        validator=check,
        concurrency_id="answers",
        show_progress="minimal",
        api_name="compare",
    )
    stop.click(None, cancels=[running])


def _buttons(label: str, name: str) -> tuple[gr.Button, gr.Button]:
    """Make a start button and a stop button, side by side on a phone too."""
    with gr.Row():
        start = gr.Button(label, variant="primary", scale=3, min_width=120, elem_id=name)
        stop = gr.Button("Stop", variant="secondary", scale=1, min_width=80, elem_id=f"{name}-stop")
    return start, stop


def _facts_tab() -> None:
    figures, records = record(), record_tables.journal()
    settings = record_tables.header(records)
    gr.Markdown(record_tables.figures())
    charts.rates(
        record_tables.removed(figures["widths"], figures["rates"], settings.get("shape")),
        fitting=50,
        label="Removed from each layer, % of its weights",
        elem_id="rates",
    )
    plans = record_tables.scored(records)
    if not len(plans):
        return
    fitness = charts.FITNESS[settings["fitness"]]
    with gr.Row():
        charts.search_curve(plans, fitness, label="The search: best so far (lower is better)", elem_id="search")
        charts.plans(plans, fitness, label="Every plan that was scored in full", elem_id="plans")


def _live_tab() -> None:
    gr.Markdown(
        f"Prunes **{live_pruning.called()}** while you watch, on text that it writes itself. A real run takes "
        "many times as much text and a longer search, and is better for it."
    )
    with gr.Row():
        beta = gr.Slider(0.1, 0.5, value=0.3, step=0.05, label="β: mean fraction of weights to remove", elem_id="beta")
        evaluations = gr.Slider(
            0,
            live_pruning.MOST_EVALUATIONS,
            value=6,
            step=1,
            label="Length of the search, in evaluations",
            elem_id="evaluations",
        )
    proposer = gr.Radio(
        [("the model itself", "self"), ("classical evolution", "evolution")],
        value="evolution",
        label="Who proposes which layer loses how much",
        elem_id="proposer",
    )
    button, stop = _buttons("Prune", "prune")
    standing = gr.Markdown("", elem_id="standing")
    with gr.Row():
        plans = charts.plans(
            record_tables.scored([]), charts.FITNESS["kl"], label="The search", visible=False, elem_id="live-search"
        )
        nothing = live_pruning.removed_by_best(live_pruning.PruningState())
        rates = charts.rates(
            nothing, fitting=20, label="Removed by the best plan so far, %", visible=False, elem_id="live-rates"
        )
    running = button.click(
        show_pruning,
        [beta, evaluations, proposer],
        [standing, plans, rates],
        concurrency_id="live",
        concurrency_limit=1,
        show_progress="hidden",
        api_visibility="private",
    )
    stop.click(lambda: "Stopped.", None, standing, cancels=[running])


def main() -> None:
    """Start the page, and load the models in a thread so that the first visitor does not wait for them."""
    page = build()
    warm = threading.Thread(target=_load_all, daemon=True)
    warm.start()
    if os.environ.get("SPACES_ZERO_GPU"):
        warm.join()  # ZeroGPU needs the models before the first request
    page.launch(
        theme=theme(),
        css=CSS,
        run_history=False,
        show_error=False,
    )


def _load_all() -> None:
    for which in ("pruned", "dense"):
        try:
            engines.load(which)
        except UnavailableError:
            return  # a visitor who sends a prompt sees the error


if __name__ == "__main__":
    main()
