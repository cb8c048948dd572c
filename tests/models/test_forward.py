"""The batches of forward passes: fixed on CPUs, found on accelerators. A CPU plays one whose memory ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.forward import ON_ACCELERATORS, last_hidden_states, windows_at_once


class Accelerator:
    """A model on a device on which passes of more than `room` windows run out of memory."""

    def __init__(self, room):
        self.room, self.tried = room, []
        self.device = SimpleNamespace(type="elsewhere")
        self.output = lambda _ids: None

    def get_decoder(self):
        def run(ids, use_cache):
            self.tried.append(tuple(ids.shape))
            if len(ids) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return self.output(ids)

        return run


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: None)  # a second each, of nothing
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kwargs: zeros(*shape, **kwargs))


def test_a_cpu_takes_what_is_asked():
    model = Accelerator(room=1)
    model.device = torch.device("cpu")
    assert [windows_at_once(model, width, 2048) for width in (128, 2048, 4096)] == [16, 1, 1]
    assert not model.tried


def test_what_fits_is_found_once_for_each_width():
    model = Accelerator(room=100)
    found = windows_at_once(model, 128, 2048)
    assert model.tried[0] == (ON_ACCELERATORS * 16, 128)
    assert 85 < found <= 100
    count = len(model.tried)
    assert windows_at_once(model, 128, 2048) == found
    assert len(model.tried) == count
    assert 85 < windows_at_once(model, 64, 2048) <= 100
    assert model.tried[count] == (ON_ACCELERATORS * 32, 64)


def test_room_for_all():
    assert windows_at_once(Accelerator(room=10**6), 128, 2048) == ON_ACCELERATORS * 16


def test_no_room_at_all():
    with pytest.raises(ModelError, match="Not one window of 128 tokens"):
        windows_at_once(Accelerator(room=0), 128, 2048)


def test_a_pass_that_runs_out_of_memory_after_the_trial_is_tried_with_fewer_windows(monkeypatch):
    """Of a candidate, whose repaired weights were not there at the trial."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    model = Accelerator(room=100)
    model.device = torch.device("meta")  # not a CPU, and tensors can be sent to it
    model.output = lambda ids: SimpleNamespace(last_hidden_state=torch.empty(*ids.shape, 2, device="meta"))
    windows = torch.ones(250, 128, dtype=torch.long)
    assert sum(len(hidden) for hidden in last_hidden_states(model, windows)) == 250 * 127
    model.room = 40
    assert sum(len(hidden) for hidden in last_hidden_states(model, windows)) == 250 * 127
    assert 30 <= windows_at_once(model, 128, 2048) <= 40
    model.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(last_hidden_states(model, windows))


def test_other_errors_are_not_taken_for_it():
    model = Accelerator(room=1)
    model.get_decoder = lambda: lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        windows_at_once(model, 128, 2048)
