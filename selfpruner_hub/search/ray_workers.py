"""Score candidates in parallel on Ray workers, each with its own copy of the model, on one machine or a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from selfpruner_hub.errors import MissingExtraError, UserError, WorkerError
from selfpruner_hub.evaluation.fitness import Fitness, SecondRepairScore
from selfpruner_hub.models.devices import choose_device, free_memory
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.search.loop import Pool

THREADS = 1
"""Number of threads of a worker. It is fixed because the split of a sum among threads changes its last bits, and scores
must not depend on the number of workers."""
RESTARTS = 20
"""Number of times that a dead worker is restarted and its unfinished plan is scored again."""
WORKER_MEMORY = 4
"""Memory of a worker, as a multiple of the model's weights: the model, its repairs, and the candidate being scored."""


def check_executor(executor: str | None) -> None:
    """Refuse an executor that is unknown or not installed, before anything is computed.

    Args:
        executor: None or `"ray"`, as for `AutoPruner.prune`.

    Raises:
        UserError: The executor is neither None nor `"ray"`.
        MissingExtraError: ray is not installed.
    """
    if executor not in (None, "ray"):
        raise UserError(f"Unknown executor {executor!r}.", 'Choose None (this process) or "ray".')
    if executor == "ray" and find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")


@contextmanager
def ray_workers(fitness: Fitness | SecondRepairScore) -> Iterator[Pool]:
    """Start the workers; they end with the context.

    Their number is limited by the CPUs that Ray has (`ray.init(num_cpus=…)` before, or RAY_ADDRESS of a cluster), and
    by memory or, where the model is on a GPU, by GPUs: each worker has one of its own, which this process may use too
    if its memory holds both. Scores do not depend on the number.

    Args:
        fitness: Fitness that each worker gets a copy of.

    Yields:
        Function that scores plans, and gives the scores in the order of the plans.

    Raises:
        UserError: The model is on an accelerator that Ray does not share out.
        WorkerError: Workers cannot be started, a GPU is too small for one, or they die again and again.
    """
    if fitness.device.type not in ("cpu", "cuda"):
        raise UserError(f"Ray shares out no devices of type {fitness.device.type!r}.", "Use executor=None, or a CPU.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # leave a worker's visible devices unchanged, without a warning
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    workers: list[Any] = []
    try:
        device = {"num_gpus": 1} if fitness.device.type == "cuda" else {"num_gpus": 0}
        kind = ray.remote(num_cpus=THREADS, **device, max_restarts=RESTARTS, max_task_retries=RESTARTS)(RayScorer)
        shared = ray.put(fitness)
        count = count_workers(ray.cluster_resources(), fitness)
        workers += [kind.remote([shared], WORKER_MEMORY * fitness.nbytes) for _ in range(count)]
        yield lambda plans, share: _scores(workers, plans, share)
    finally:
        for worker in workers:
            ray.kill(worker)
        if ours:
            ray.shutdown()


def count_workers(resources: dict[str, float], fitness: Fitness | SecondRepairScore) -> int:
    """Count the model copies that fit in Ray's resources.

    Args:
        resources: Resources of the cluster by name, as Ray gives them; memory in bytes.
        fitness: Fitness that each worker gets a copy of.

    Returns:
        Number of workers, at least 1.

    Raises:
        WorkerError: The model is on a GPU, and Ray has none; a worker would be waited for without end.
    """
    fitting = [resources.get("CPU", 1) // THREADS, resources.get("memory", 0) // (WORKER_MEMORY * fitness.nbytes)]
    if fitness.device.type == "cuda":
        if resources.get("GPU", 0) < 1:
            raise WorkerError("Ray has no GPU for a worker.", "Start it with GPUs, or use executor=None.")
        fitting = [resources["GPU"], fitting[0]]
    return max(1, int(min(fitting)))


def check_memory(free: float, needed: float) -> None:
    """Refuse a GPU that is too small for a worker, or that another process fills.

    Args:
        free: Free memory of the GPU in bytes; infinite on a CPU.
        needed: Memory of a worker in bytes.

    Raises:
        WorkerError: The worker does not fit.
    """
    if free < needed:
        raise WorkerError(
            f"A GPU has {free / 2**30:.1f} GiB free, and a worker needs {needed / 2**30:.1f}.",
            "Use executor=None, or GPUs with more memory.",
        )


class RayScorer:
    """Ray actor that scores plans with its own copy of the fitness.

    Args:
        shared: Reference to the fitness in Ray's store, in a list of one: Ray does not fetch references inside a list
            by itself, so a restarted worker can fetch it again.
        needed: Memory that it takes, in bytes; checked on a GPU.

    Raises:
        WorkerError: The GPU of this worker has less free memory.
    """

    def __init__(self, shared: list[Any], needed: float) -> None:
        import ray

        torch.set_num_threads(THREADS)
        check_memory(free_memory(choose_device()), needed)
        self._fitness: Fitness | SecondRepairScore = ray.get(shared[0])
        self._fitness.size_batches()

    def process(self) -> int:
        """Return the process id."""
        return os.getpid()

    def score(self, plan: Plan, share: float) -> float:
        """Score a plan on the first share of the windows."""
        return self._fitness(plan, share)


def _scores(workers: Sequence[Any], plans: Sequence[Plan], share: float) -> Iterator[float]:
    from ray.exceptions import RayError
    from ray.util import ActorPool

    try:
        yield from ActorPool(workers).map(lambda worker, plan: worker.score.remote(plan, share), plans)
    except RayError as error:
        raise WorkerError(
            f"A Ray worker failed: {str(error).strip().splitlines()[-1]}",
            "The journal is kept: the same command goes on from there, also with executor=None.",
        ) from error
