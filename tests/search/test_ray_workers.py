"""Ray workers: the plan does not depend on how many there are, nor on one that dies."""

from __future__ import annotations

import importlib
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from support.tiny import tiny_model

from selfpruner_hub.errors import MissingExtraError, UserError, WorkerError
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.search.ray_workers import WORKER_MEMORY, check_executor, check_memory, count_workers, ray_workers

pytestmark = pytest.mark.heavy
SETTINGS = {
    "data": "self", "proposer": "evolution", "window": 32, "calibration_tokens": 512, "fitness_tokens": 256,
    "evaluations": 16, "schedule": {"population": 4, "crossover": 4, "mutation": 4}, "repair": "output",
    "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    """Ray with two processors, and no more of it afterwards."""
    ray = pytest.importorskip("ray", reason="ray is not installed")  # seconds that other tests need not wait
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 gives workers a thirtieth of a busy core: minutes of waiting
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
            object_store_memory=100 * 2**20,
        )  # fmt: skip
        yield ray
        ray.shutdown()


def prune(tmp_path, name, executor="ray"):
    """Prune a tiny model on the workers; its plan, and the journal without what differs from run to run."""
    pruner = AutoPruner(tiny_model("llama"), None, "tiny")
    pruned = pruner.prune(0.3, run_dir=tmp_path / name, executor=executor, **SETTINGS)
    lines = (tmp_path / name / "search.jsonl").read_text().splitlines()
    return pruned.plan, [line.split('"seconds"')[0] for line in lines]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_two_workers_one_of_them_killed_find_the_plan_of_this_process(cluster, tmp_path, monkeypatch):
    alone = prune(tmp_path, "alone", executor=None)
    workers, killed = importlib.import_module("selfpruner_hub.search.ray_workers"), []
    scores = workers._scores

    def watched(actors, plans, share):
        assert len(actors) == 2
        for done, score in enumerate(scores(actors, plans, share)):
            if done == 1 and not killed:  # half-way through a round, the other has something at work
                killed.append(cluster.get(actors[1].process.remote()))
                os.kill(killed[0], signal.SIGKILL)
            yield score
        assert cluster.get(actors[1].process.remote()) != killed[0]  # another took its place

    monkeypatch.setattr(workers, "_scores", watched)
    assert prune(tmp_path, "two") == alone
    assert killed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_workers_that_die_more_often_than_they_are_restarted_end_in_one_line(cluster, tmp_path, monkeypatch):
    workers = importlib.import_module("selfpruner_hub.search.ray_workers")
    scores = workers._scores

    def watched(actors, plans, share):
        os.kill(cluster.get(actors[0].process.remote()), signal.SIGKILL)
        return scores(actors, plans, share)

    monkeypatch.setattr(workers, "_scores", watched)
    monkeypatch.setattr(workers, "RESTARTS", 0)
    monkeypatch.setattr(workers, "count_workers", lambda *_: 1)  # each takes seconds to start
    with pytest.raises(WorkerError, match="A Ray worker failed") as failure:
        prune(tmp_path, "dying")
    assert "\n" not in str(failure.value)
    assert "goes on from there" in str(failure.value)


def test_as_many_workers_as_fit():
    fitness = SimpleNamespace(device=torch.device("cpu"), nbytes=1000)
    room = {"CPU": 4.0, "memory": 1e9}
    assert count_workers(room, fitness) == 4
    assert count_workers({**room, "memory": 2.5 * WORKER_MEMORY * 1000}, fitness) == 2
    assert count_workers({}, fitness) == 1
    on_gpu = SimpleNamespace(device=torch.device("cuda"), nbytes=1000)
    assert count_workers({**room, "GPU": 2.0}, on_gpu) == 2
    for none in ({}, {"GPU": 0.0}):
        with pytest.raises(WorkerError, match="Ray has no GPU"):
            count_workers({**room, **none}, on_gpu)


def test_a_gpu_that_is_too_small_or_of_another_kind_is_refused():
    check_memory(free=2e9, needed=2e9)
    with pytest.raises(WorkerError, match=r"A GPU has 1.9 GiB free, and a worker needs 2.8. Use executor=None"):
        check_memory(free=2e9, needed=3e9)
    on_mps = SimpleNamespace(device=torch.device("mps"), nbytes=1000)
    with pytest.raises(UserError, match="no devices of type 'mps'"), ray_workers(on_mps):
        pass


def test_what_is_unknown_or_missing_is_refused_at_once(monkeypatch):
    with pytest.raises(UserError, match="Unknown executor 'dask'"):
        check_executor("dask")
    monkeypatch.setattr("selfpruner_hub.search.ray_workers.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"selfpruner-hub\[ray\]"):
        AutoPruner(tiny_model("llama"), None, "tiny").prune(0.3, executor="ray", progress=False)
    check_executor(None)
