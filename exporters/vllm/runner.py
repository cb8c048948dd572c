"""A model in vLLM, timed: run by the Python of vLLM's environment, which has neither this package nor its libraries.

It answers the requests of `exporters.benchmark.worker.Worker`, one line of JSON each, and imports vLLM alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

VLLM_PAUSE = 0.01
"""Seconds to wait before a pass: the other model's threads keep spinning for some milliseconds after theirs."""
CACHE_GB = "2"
"""GiB of the KV cache on a CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise."""
GPU_SHARE = 0.9
"""Share of a GPU's memory that all models together reserve."""
SPARE_STEPS = 2
"""Steps of the engine that may bring no token."""
_STATUS = Path("/proc/self/status")


class Vllm:
    """A model in vLLM's engine, in this process.

    Args:
        name: Directory or Hub repository of the model.
        setting: Fields of `exporters.runtime.Setting`.
    """

    def __init__(self, name: str, setting: dict[str, Any]) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(setting["threads"])}
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GB)
        from vllm import LLM
        from vllm.platforms import current_platform

        kind = setting["device"].partition(":")[0]
        if current_platform.device_type != kind:
            raise ValueError(f"This vLLM runs on {current_platform.device_type}, not on {kind}.")
        # Of a GPU, an engine reserves nine tenths by default, and the next one would not start.
        share = {} if kind == "cpu" else {"gpu_memory_utilization": GPU_SHARE / setting["models"]}
        self._engine = LLM(
            model=name,
            dtype=setting["dtype"],
            trust_remote_code=setting["staged"],
            max_model_len=setting["longest"],
            max_num_seqs=setting["batch"],
            # All prompts of a batch fit into one step, so that prefill ends before decode begins.
            max_num_batched_tokens=max(2048, setting["batch"] * setting["longest"]),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # every pass reads the same prompts
            **share,
        ).llm_engine
        self._names = map(str, itertools.count())

    def measure(self, ids: list[list[int]], new_tokens: int) -> dict[str, float]:
        """Time a pass: milliseconds until every prompt has a token, and mean milliseconds of each further token."""
        from vllm import SamplingParams

        # `prefill` includes the first new token; `decode` is the time of the others.
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens + 1, ignore_eos=True, detokenize=False)
        waiting = {next(self._names) for _ in ids}
        steps = reads = 0
        start = read = time.perf_counter()
        for name, prompt in zip(sorted(waiting), ids, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while self._engine.has_unfinished_requests():
            reading = bool(waiting)
            outputs = self._engine.step()
            waiting -= {output.request_id for output in outputs}
            steps, reads = steps + 1, reads + reading
            if reading:
                read = time.perf_counter()
            # A prompt that waits is read after others have ended; one that lost its place in the cache is read again.
            if (waiting and any(output.finished for output in outputs)) or steps > reads + new_tokens + SPARE_STEPS:
                size = f"{len(ids)} prompts of {len(ids[0])} tokens and {new_tokens} after each"
                raise ValueError(f"The KV cache is too small for {size}: they would wait for one another.")
        return {"prefill": 1000 * (read - start), "decode": 1000 * (time.perf_counter() - read) / new_tokens}


class Server:
    """Answers requests: load a model, time a pass, report the memory."""

    model: Vllm
    loading: float

    def __call__(self, request: dict[str, Any]) -> Any:
        """Answer a request; see `exporters.benchmark.worker.Worker`."""
        if "name" in request:
            self.model = Vllm(request["name"], request["setting"])
            self.loading = vllm_peak_memory()
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak
            return None
        if "ids" in request:
            time.sleep(VLLM_PAUSE)
            return self.model.measure(request["ids"], request["new_tokens"])
        return {"peak_mb": vllm_peak_memory(), "loading_mb": self.loading}


def vllm_peak_memory() -> float:
    """Peak resident memory of this process, in MB (10⁶ bytes); 0 where the system does not tell."""
    peak = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="utf-8")) if _STATUS.exists() else None
    return round(int(peak[1]) * 1024 / 1e6, 1) if peak else 0.0


def main() -> None:
    """Answer requests from stdin until it ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr, so that stdout holds replies only
    serve = Server()
    for line in sys.stdin:
        try:
            reply = {"result": serve(json.loads(line))}
        except Exception as error:  # vLLM raises many types; only the first line of them says something
            message = str(error).strip().splitlines() or [type(error).__name__]
            reply = {"error": f"vLLM: {message[0]}"[:400], "hint": "See docs/serving.md."}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are not top-level ones
    main()
