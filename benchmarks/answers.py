"""Answers of models of one parent, question by question: what a choice about recovery costs or brings, and its error.

Run: python benchmarks/answers.py WORK DENSE BASE MODEL …
DENSE is the parent. Each MODEL is compared with BASE, such as a recovered model with its cut, on the half of the
questions that choices are made on. WORK keeps rows, so that a model that was measured is not asked again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from columns import markdown
from protocol import Chat, Rows, paired
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import prompt_ids
from selfpruner_hub.evaluation.questions import PlainQuestion, replies
from selfpruner_hub.models.loading import load_model

MEASURES = ("sampled", "first", "reply")
"""By question: share of samples that are right, the likeliest answer, and log-probability of the parent's reply."""


def main(words: Sequence[str] | None = None) -> None:
    """Measure every model, and print the differences from BASE with their standard errors over questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("dense", type=Path, metavar="DENSE")
    parser.add_argument("models", type=Path, metavar="MODEL", nargs="+")
    options = parser.parse_args(words)
    dense, tokenizer = load_model(str(options.dense), dtype="auto")
    if tokenizer is None:
        parser.error(f"{options.dense} has no tokenizer.")
    rows, chat = Rows(options.work / "answers.jsonl"), Chat(dense, tokenizer, options.work, half="develop")
    known = replies(dense, tokenizer, [each.question for each in chat.answerable])
    for path in (options.dense, *options.models):
        if not rows.have(model=path.name):
            model, _ = load_model(str(path), dtype="auto")
            rows.keep({"model": path.name, **answers(model, tokenizer, chat, known), **chat.figures(model)})
    of_name = {row["model"]: row for row in rows}
    base = of_name[options.models[0].name]
    shown = [compared(of_name[path.name], base) for path in options.models]
    print(markdown(["model", *MEASURES, "KL, chat", "agreement", "KL, code"], shown))


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: Chat, known: Sequence[str]
) -> dict[str, list[float]]:
    """The `MEASURES` of a model for each question that the parent answers, with the replies `known`."""
    own = replies(model, tokenizer, [each.question for each in chat.answerable])
    asked: list[tuple[PlainQuestion, str, str]] = [*zip(chat.answerable, own, known, strict=True)]
    return {
        "sampled": [sum(right) / len(right) for right in chat.samples(model)],
        "first": [float(question.is_right(reply)) for question, reply, _ in asked],
        "reply": [log_probability(model, tokenizer, question.question, reply) for question, _, reply in asked],
    }


@torch.inference_mode()
def log_probability(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, reply: str) -> float:
    """Log-probability of a reply to a question, in nats."""
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": question}])
    ids = torch.tensor([*prompt, *tokenizer(reply, add_special_tokens=False).input_ids])
    predictions = model(ids[None, :-1]).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
    return float(predictions.gather(1, ids[len(prompt) :, None]).sum())


def compared(row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Cells of a model: means of its measures, with the differences from `base` and their errors behind them."""
    cells = [row["model"]]
    for name in MEASURES:
        gap = paired(row[name], base[name])
        own = f"{sum(row[name]) / len(row[name]):.3f}"
        cells.append(own if row is base else f"{own}, {gap['difference']:+.3f} ± {gap['standard_error']:.3f}")
    return [*cells, f"{row['kl_chat']:.3f}", f"{row['agreement']:.3f}", f"{row['kl_code']:.3f}"]


if __name__ == "__main__":
    main()
