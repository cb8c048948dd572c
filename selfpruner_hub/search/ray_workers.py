"""Candidates scored side by side on Ray workers, each with its own copy of the model: on one machine, or a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from selfpruner_hub.errors import MissingExtraError, UserError, WorkerError
from selfpruner_hub.evaluation.fitness import Fitness, SecondRepairScore
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.search.loop import Pool

THREADS = 1
"""Of each worker. Always the same: how sums are split among threads decides their last bits, and how many workers there
are must not."""
RESTARTS = 20
"""Times that a worker that died is started again, and what it was scoring is scored again."""
MEMORY = 4
"""What a worker takes, as a multiple of the weights: the model, its repairs, and a candidate at work."""


def check_executor(executor: str | None) -> None:
    """Refuse an executor that is unknown or not installed, before anything is computed.

    Args:
        executor: As for `AutoPruner.prune`.

    Raises:
        UserError: It is neither None nor `"ray"`.
        MissingExtraError: ray is not installed.
    """
    if executor not in (None, "ray"):
        raise UserError(f"Unknown executor {executor!r}.", 'Choose None (this process) or "ray".')
    if executor == "ray" and find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")


@contextmanager
def ray_workers(fitness: Fitness | SecondRepairScore) -> Iterator[Pool]:
    """Start the workers; they end with the context.

    There are as many as Ray has processors for (`ray.init(num_cpus=…)` before, or RAY_ADDRESS of a cluster), graphics
    processors where the model is on one, and memory. Scores do not depend on how many they are.

    Args:
        fitness: What each of them gets a copy of.

    Yields:
        Scores plans, in their order.

    Raises:
        WorkerError: Workers cannot be started, or die again and again.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # keep what devices a worker sees, without a warning
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    workers: list[Any] = []
    try:
        device = {"num_gpus": 1} if fitness.device.type == "cuda" else {"num_gpus": 0}
        kind = ray.remote(num_cpus=THREADS, **device, max_restarts=RESTARTS, max_task_retries=RESTARTS)(Worker)
        shared = ray.put(fitness)
        workers += [kind.remote([shared]) for _ in range(count_workers(ray.cluster_resources(), fitness))]
        yield lambda plans, share: _scores(workers, plans, share)
    finally:
        for worker in workers:
            ray.kill(worker)
        if ours:
            ray.shutdown()


def count_workers(resources: dict[str, float], fitness: Fitness | SecondRepairScore) -> int:
    """How many copies of a model fit in what Ray says there is, at least one."""
    fitting = [resources.get("CPU", 1) // THREADS, resources.get("memory", 0) // (MEMORY * fitness.nbytes)]
    if fitness.device.type == "cuda":
        fitting = [resources.get("GPU", 1), fitting[0]]
    return max(1, int(min(fitting)))


class Worker:
    """Scores on a copy of the fitness.

    Args:
        shared: Where it lies in Ray's store, in a list of one: what is in a list is not fetched before it is asked for,
            so a worker that is started again finds it.
    """

    def __init__(self, shared: list[Any]) -> None:
        import ray

        torch.set_num_threads(THREADS)
        self._fitness: Fitness | SecondRepairScore = ray.get(shared[0])

    def process(self) -> int:
        """Its process id."""
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
