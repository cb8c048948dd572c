"""Ctrl-C held back, so that what is begun is finished, and what was begun in vain is cleaned up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Hold back the interrupt of a user (Ctrl-C) until the end of the context, so that what is begun is finished.

    Only the main thread receives interrupts; in others, this does nothing.

    Yields:
        Context manager for work inside that may be interrupted. After one interrupt, further ones are held back again:
        they do not end the cleaning up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield nullcontext
        return
    held: list[Any] = []
    through = False

    def receive(*caught: Any) -> None:
        nonlocal through
        if not through:
            held.append(caught)
        elif callable(before):
            through = False
            before(*caught)
            through = True

    @contextmanager
    def interruptible() -> Iterator[None]:
        nonlocal through
        through = True
        try:
            if held:
                receive(*held.pop())
            yield
        finally:
            through = False

    # A handler of a C library cannot be put back. The default action would end the process without a word.
    before = signal.getsignal(signal.SIGINT)
    before = signal.default_int_handler if before is None else before
    signal.signal(signal.SIGINT, receive)
    try:
        yield interruptible
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])
