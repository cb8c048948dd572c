"""Shared parts of the benchmarks: rows that are saved at once, measures on unseen text and chats, JSON results."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters.machine import cores, describe_machine, processor
from selfpruner_hub import __version__
from selfpruner_hub.calibration.chat_template import decoded, prompt_ids
from selfpruner_hub.calibration.conversations import end_tokens
from selfpruner_hub.calibration.corpus import consecutive_windows
from selfpruner_hub.calibration.generated_text import continuations
from selfpruner_hub.evaluation.chat import SEED, ChatMeasure
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.evaluation.questions import REPLY_TOKENS, PlainQuestion, load_questions, rightly_answered


def arguments(documentation: str | None) -> argparse.ArgumentParser:
    """A parser of what a benchmark takes that searches on one text and measures on another."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("search_text", metavar="SEARCH_TEXT")
    parser.add_argument("unseen_text", metavar="UNSEEN_TEXT")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the JSON (default: benchmarks)")
    return parser


class Rows(list[dict[str, Any]]):
    """Rows of figures in a file, one JSON object per line, so that a stopped benchmark can continue.

    Args:
        file: Path of the file; its rows are read if it exists.
        published: Path of a JSON file of results, whose rows are taken where the file does not exist.
    """

    def __init__(self, file: Path, published: Path | None = None) -> None:
        super().__init__(json.loads(line) for line in (file.read_text().splitlines() if file.exists() else ()))
        self._file = file
        if published is not None and published.exists() and not file.exists():
            for row in json.loads(published.read_text())["results"]:
                self.keep(row)

    def have(self, **values: Any) -> bool:
        """Whether a row with these values exists."""
        return any(values.items() <= row.items() for row in self)

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row, append it to the file, and print it."""
        self.append(row)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


class Unseen:
    """Windows of a text that is not used for any choice: the first ones, and some that are spread over all of it.

    The first windows of a text of long articles are of two or three articles, so chance weighs more there.

    Args:
        text: Path of the text.
        tokenizer: Tokenizer of the models.
    """

    COUNTS = {512: 32, 2048: 8}  # noqa: RUF012
    WIDTH, SPREAD = 512, 64
    WORDS = (
        f"{', '.join(f'{count} of {length} tokens' for length, count in COUNTS.items())}; "
        f"perplexity_spread: on {SPREAD} of {WIDTH} tokens, spread evenly over all of it"
    )
    NAMES = (*(f"perplexity_{length}" for length in COUNTS), "perplexity_spread")

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        cases = self.COUNTS.items()
        self.windows = {length: consecutive_windows(text, tokenizer, length, count).windows for length, count in cases}
        whole = consecutive_windows(text, tokenizer, self.WIDTH).windows
        self.spread = whole[[number * len(whole) // self.SPREAD for number in range(self.SPREAD)]]

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexities of a model in its own dtype, by `NAMES`."""
        values = (round(perplexity(model, windows), 2) for windows in (*self.windows.values(), self.spread))
        return dict(zip(self.NAMES, values, strict=True))


class Chat:
    """Measures a pruned chat model against the dense one: on conversations, plain questions, and code.

    Args:
        dense: Dense model, which generates the conversations.
        tokenizer: Tokenizer of the models.
        work: Directory for the text of the code.
        half: Half of the plain questions: `"report"` for figures; `"develop"`, with other conversations, for choices.
    """

    NAMES = ("kl_chat", "agreement", "answered", "kept", "kl_code")
    MODULES, CHARACTERS = 40, 3_000
    WINDOW, COUNT = 512, 32

    def __init__(
        self, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, work: Path, half: str = "report"
    ) -> None:
        self._tokenizer, self._questions = tokenizer, load_questions(half)
        self._conversations = ChatMeasure(dense, tokenizer, seed=SEED - (half != "report"))
        self._right = rightly_answered(dense, tokenizer, self._questions)
        self._code = consecutive_windows(self._source(work), tokenizer, self.WINDOW, self.COUNT).windows
        self._teacher = teach(dense, self._code)
        self.words = (
            f"KL to the dense model and agreement with it (share of its tokens that are the first choice) over the "
            f"{self._conversations.tokens} tokens that it answers, by its likeliest tokens, in "
            f"{self._conversations.conversations} conversations of its own; share of the {len(self._questions)} plain "
            f"questions (half {half!r}) that are answered, and of the {sum(self._right)} that the dense model answers; "
            f"KL to the dense model on code: {self.COUNT} windows of {self.WINDOW} tokens, the first {self.CHARACTERS} "
            f"characters each of the last {self.MODULES} modules of the standard library of Python "
            f"{platform.python_version()}"
        )

    def figures(self, model: PreTrainedModel) -> dict[str, float]:
        """Measure a model; figures by `NAMES`."""
        chat = self._conversations(model)
        right = rightly_answered(model, self._tokenizer, self._questions)
        kept = [own for own, dense in zip(right, self._right, strict=True) if dense]
        code = divergence(model, self._code, self._teacher)
        values = (chat.kl, chat.agreement, mean(right), mean(kept) if kept else 1.0, code)
        return {name: round(value, 4) for name, value in zip(self.NAMES, values, strict=True)}

    SAMPLES, TEMPERATURE, SAMPLE_SEED = 8, 0.7, 5
    SAMPLED = f"questions kept by one of {SAMPLES} samples (mean) and within {SAMPLES}, at temperature {TEMPERATURE}"

    def sampled(self, model: PreTrainedModel) -> dict[str, float]:
        """Share of the questions that the dense model answers which one sample answers, and one of `SAMPLES`."""
        right = self.samples(model)
        return {
            "kept_sampled": round(mean(map(mean, right)), 4),
            f"kept_within_{self.SAMPLES}": round(mean(map(any, right)), 4),
        }

    def samples(self, model: PreTrainedModel) -> list[list[bool]]:
        """Whether each of `SAMPLES` sampled replies is right, for each question that the dense model answers."""
        prompts = [prompt_ids(self._tokenizer, [{"role": "user", "content": q.question}]) for q in self.answerable]
        replies = continuations(
            model,
            [prompt for prompt in prompts for _ in range(self.SAMPLES)],
            REPLY_TOKENS,
            ends=end_tokens(model, self._tokenizer),
            temperature=self.TEMPERATURE,
            seed=self.SAMPLE_SEED,
        )
        of_each = [replies[first : first + self.SAMPLES] for first in range(0, len(replies), self.SAMPLES)]
        return [
            [question.is_right(decoded(self._tokenizer, reply)) for reply in own]
            for question, own in zip(self.answerable, of_each, strict=True)
        ]

    @property
    def answerable(self) -> list[PlainQuestion]:
        """The questions that the dense model answers."""
        return [question for question, right in zip(self._questions, self._right, strict=True) if right]

    def _source(self, work: Path) -> str:
        """Write the text of Python code, and return its path."""
        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))[-self.MODULES :]
        texts = [path.read_text(encoding="utf-8", errors="ignore")[: self.CHARACTERS] for path in modules]
        work.mkdir(parents=True, exist_ok=True)
        (work / "code.txt").write_text("\n".join(texts), encoding="utf-8")
        return str(work / "code.txt")


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The mean difference of two models over the same windows, and its standard error over windows."""
    gaps = [one - other for one, other in zip(ours, theirs, strict=True)]
    return {
        "difference": round(mean(gaps), 4),
        "standard_error": round(stdev(gaps) / math.sqrt(len(gaps)), 4),
    }


def memory(key: str = "VmRSS") -> float:
    """Resident memory of this process, in MB; its peak with `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


@contextmanager
def peak_of_memory() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the peak resident memory since the start of the context, in MB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that is still resident would hide new allocations
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    yield lambda: memory("VmHWM")


def write(name: str, protocol: str, results: Any, directory: Path | None = None) -> None:
    """Write `NAME.json` whole, so that a stop leaves the old or the new file, and print its name.

    Args:
        name: Name of the file.
        protocol: What was measured, and how.
        results: Figures, JSON-serialisable.
        directory: Directory of the file; None takes that of the benchmarks.
    """
    path = (directory or Path(__file__).parent) / f"{name}.json"
    gpu = {key: value for key, value in describe_machine("cuda").items() if key == "gpu"}  # where there is one
    content = {
        "protocol": protocol,
        "date": date.today().isoformat(),
        "machine": {"cpu": processor(), "cores": cores(), "threads": torch.get_num_threads(), "shared": True, **gpu},
        "versions": {"selfpruner-hub": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".json.new")
    whole.write_text(json.dumps(content, indent=2) + "\n")
    whole.replace(path)
    print(f"wrote {path.name}")
