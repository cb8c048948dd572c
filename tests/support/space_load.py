"""Many visitors at once: answers per minute, errors, and how the memory of the page's process grows.

python tests/support/space_load.py http://127.0.0.1:7860 --pid PID --users 10 --seconds 120
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, field

import psutil
from gradio_client import Client

PROMPT = "Write one sentence about visitor {} and question {}."


@dataclass
class Load:
    """What came of it."""

    answers: int = 0
    errors: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    """Seconds from asking to both answers."""
    memory: list[float] = field(default_factory=list)
    """Bytes, once a second."""

    def growth(self) -> float:
        """Bytes: how much more the last third takes than the middle one; the first is warming up."""
        third = len(self.memory) // 3
        middle, last = self.memory[third : 2 * third], self.memory[2 * third :]
        return sum(last) / len(last) - sum(middle) / len(middle)


def visit(url: str, pid: int, users: int, seconds: float, tokens: int = 32) -> Load:
    """Let `users` ask, each one question after the other.

    Args:
        url: Of the page.
        pid: Of the process whose memory, with that of its children, is watched.
        users: At once.
        seconds: After this time, no new question is asked.
        tokens: Longest answer.

    Returns:
        What came of it.
    """
    load, lock, end = Load(), threading.Lock(), time.monotonic() + seconds

    def ask(user: int) -> None:
        client, question = Client(url, verbose=False), 0
        while time.monotonic() < end:
            started, question = time.monotonic(), question + 1
            try:
                *_, verdict = client.predict(PROMPT.format(user, question), tokens, api_name="/compare")
                wrong = "" if "speed of its parent" in verdict else f"no verdict: {verdict!r}"
            except Exception as error:
                wrong = repr(error)
            with lock:
                load.answers += not wrong
                load.waited.append(time.monotonic() - started)
                load.errors += [wrong] if wrong else []

    threads = [threading.Thread(target=ask, args=(user,), daemon=True) for user in range(users)]
    for thread in threads:
        thread.start()
    process = psutil.Process(pid)
    while any(thread.is_alive() for thread in threads):
        load.memory.append(sum(p.memory_info().rss for p in (process, *process.children(recursive=True))))
        time.sleep(1)
    return load


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    found = visit(options.url, options.pid, options.users, options.seconds)
    summary = {**asdict(found), "memory": [round(m / 1e6) for m in found.memory[:: max(1, len(found.memory) // 20)]]}
    summary["waited"] = [round(f(found.waited), 1) for f in (min, lambda w: sum(w) / len(w), max)]
    sys.stdout.write(json.dumps({**summary, "growth_mb": round(found.growth() / 1e6, 1)}, indent=2))
