"""The process of a training: what a step frees stays with it, and goes back to the system at the end."""

import ctypes
import resource
import sys

import pytest
import torch

from selfpruner_hub.recovery.process import keeping_memory

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the allocator of glibc"
)


def new_pages() -> int:
    """Pages that the system gives for a block of 64 MB that is used and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
def test_a_step_gets_the_memory_of_the_step_before():
    with keeping_memory():
        new_pages()
        assert new_pages() < 100
    assert new_pages() > 100  # huge pages are 2 MB, others 4 kB; the system got all back
