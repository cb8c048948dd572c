"""The machine of a measurement: its processor, its threads, and the peak memory of this process."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def describe_machine(device: str) -> dict[str, str | int]:
    """Describe the processor of a device.

    Args:
        device: `"cpu"`, or a GPU as PyTorch names it.

    Returns:
        `processor` (CPU model), `cores` (that this process may use), and `gpu` (its name) if the device is a GPU.
    """
    description: dict[str, str | int] = {"processor": processor(), "cores": cores()}
    if device.startswith("cuda") and torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name(device)
    return description


def cores() -> int:
    """Number of logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_threads() -> int:
    """PyTorch's number of threads, at most the cores that this process may use; more threads would be very slow."""
    return min(torch.get_num_threads(), cores())


def processor() -> str:
    """The model name of the CPU."""
    with contextlib.suppress(OSError):
        if name := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return name[1].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> float:
    """Peak resident memory of this process since `forget_peak`, in MB (10⁶ bytes)."""
    # ru_maxrss only as a fallback: a child process starts with its parent's value.
    if _STATUS.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="utf-8"))):
        return round(int(peak[1]) * 1024 / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def forget_peak() -> None:
    """Reset the peak memory; only Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
