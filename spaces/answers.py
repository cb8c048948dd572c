"""The answer of a model as a stream, with its measured speed; time limit and stop are the same for every engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from engines import load
from model_source import UnavailableError
from tokens import encode_prompt, tokenizer

try:  # Hugging Face's package on a ZeroGPU Space; elsewhere the import may find this folder itself
    from spaces import GPU
except ImportError:

    def GPU(duration: int) -> Callable[[Any], Any]:
        """Return the function unchanged: there is no GPU to request."""
        return lambda function: function


LONGEST_PROMPT = 2_000
"""Maximum length of a prompt, in characters."""
MOST_TOKENS = 256
ANSWER_SECONDS = 60
"""Time limit for the answer of one model, in seconds."""

_writing = threading.Lock()
"""Lock that is held while a model writes: one that is told to stop ends with its next token."""


@dataclass
class Answer:
    """The part of an answer that is written, and its timing."""

    text: str = ""
    tokens: int = 0
    first: float | None = None
    """Time from the request to the first token, in seconds; None before that."""
    seconds: float = 0.0
    done: bool = False
    runtime: str = ""
    """Runtime that writes, its dtype and threads."""

    def add(self, piece: str, tokens: int, seconds: float) -> None:
        """Add a piece of text.

        Args:
            piece: Text.
            tokens: Number of tokens up to its end.
            seconds: Time from the request to its last token.
        """
        self.text += piece
        if tokens > self.tokens:  # the rest of the text comes after the last token
            self.tokens, self.seconds, self.first = tokens, seconds, self.first or seconds

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first token; None with fewer than two tokens."""
        writing = self.seconds - (self.first or 0.0)
        return (self.tokens - 1) / writing if self.tokens > 1 and writing > 0 else None

    def took(self) -> str:
        """Return the rate, the time to the first token, the number of tokens and the runtime, as Markdown."""
        if self.first is None:
            return "reading the prompt …"
        rate = f"**{self.rate:.1f}** tokens/s" if self.rate else ""
        parts = (rate, f"first token after **{self.first:.2f} s**", f"{self.tokens} tokens", self.runtime)
        return " · ".join(filter(None, parts))


@GPU(duration=ANSWER_SECONDS)
def answer(which: str, prompt: str, tokens: int) -> Iterator[Answer]:
    """Generate the answer of one model.

    Args:
        which: Name of the model, `pruned` or `dense`.
        prompt: Prompt that a visitor typed.
        tokens: Maximum number of tokens to write.

    Yields:
        The answer so far, after each piece of text.

    Raises:
        UnavailableError: The model cannot be loaded, fails or takes too long, or the prompt is too long for it.
    """
    engine = load(which)
    ids = encode_prompt(tokenizer(), prompt)["input_ids"][0].tolist()
    room = engine.longest - len(ids)
    if room < 1:
        raise UnavailableError("The prompt is longer than the model can read. Shorten it.")
    stop, messages = threading.Event(), SimpleQueue[Any]()

    def write() -> None:
        with _writing:
            started = time.perf_counter()

            def tell(piece: str, count: int) -> bool:
                seconds = time.perf_counter() - started
                messages.put((piece, count, seconds))
                return stop.is_set() or seconds > ANSWER_SECONDS

            try:
                if not stop.is_set():
                    engine.write(ids, min(tokens, room, MOST_TOKENS), tell)
                messages.put(None)
            except Exception as error:
                messages.put(error)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    written = Answer(runtime=engine.runtime)
    try:
        yield written
        while (news := messages.get(timeout=ANSWER_SECONDS)) is not None:
            if isinstance(news, Exception):
                raise UnavailableError(f"The {which} model failed ({type(news).__name__}).")
            written.add(*news)
            yield written
        written.done = True
        yield written
    except Empty:
        raise UnavailableError(f"The {which} model wrote nothing for {ANSWER_SECONDS} s. Try again later.") from None
    finally:  # also when the visitor has left: Gradio then closes this on its event loop, so it waits for nothing
        stop.set()
