"""What figures were measured on: the processor, and how much memory this process took."""

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


def describe(device: str) -> dict[str, str | int]:
    """Name the processor that a device is.

    Args:
        device: `"cpu"`, or torch's name of a GPU.

    Returns:
        `processor`, `cores` that this process may use, and `gpu` where there is one.
    """
    found: dict[str, str | int] = {"processor": processor(), "cores": cores()}
    if device.startswith("cuda") and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def cores() -> int:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """As many as PyTorch takes, but no more than this process may use: threads that wait in turns are very slow."""
    return min(torch.get_num_threads(), cores())


def processor() -> str:
    """The model name of the CPU."""
    with contextlib.suppress(OSError):
        if name := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return name[1].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> float:
    """The most memory that this process has had resident, in MB (10⁶ bytes), since `forget_peak`."""
    # Not ru_maxrss where it can be avoided: a child begins with that of its parent.
    if _STATUS.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="utf-8"))):
        return round(int(peak[1]) * 1024 / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def forget_peak() -> None:
    """Begin to measure the peak anew, where the system can: on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
