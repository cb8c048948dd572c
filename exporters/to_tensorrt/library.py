"""Import of TensorRT or TensorRT-RTX, which have the same Python API."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

import torch

from selfpruner_hub.errors import MissingExtraError, UserError

TENSORRT_LIBRARIES = ("tensorrt", "tensorrt_rtx")
TENSORRT_EXTRA = "tensorrt-rtx"


@dataclass(frozen=True)
class Library:
    """The imported library, TensorRT or TensorRT-RTX."""

    name: str
    module: Any
    log: Any
    """Logger for builders and runtimes; `log.last_error` is the last error message."""

    @property
    def distribution(self) -> str:
        """Name of the package on PyPI."""
        return importlib.metadata.packages_distributions()[self.name][0]

    @property
    def capabilities(self) -> dict[str, Any]:
        """Compute capabilities, such as "8.6", for which it can build without that GPU."""
        enumeration = getattr(self.module, "ComputeCapability", None)
        numbers = {name: re.fullmatch(r"SM(\d+)(\d)", name) for name in dir(enumeration)}
        return {f"{match[1]}.{match[2]}": getattr(enumeration, name) for name, match in numbers.items() if match}


def find_library(name: str | None = None, *, elsewhere: bool = False) -> Library:
    """Import TensorRT.

    Args:
        name: Library name, one of `TENSORRT_LIBRARIES`; None takes the first that is installed.
        elsewhere: Flag to require building for a GPU that is not here; only TensorRT-RTX can.

    Returns:
        The library.

    Raises:
        MissingExtraError: No suitable library is installed.
    """
    for candidate in TENSORRT_LIBRARIES if name is None else (name,):
        try:
            module = importlib.import_module(candidate)
        except (ImportError, OSError):  # OSError: a CUDA library of the installed wheel is missing
            continue
        if not elsewhere or hasattr(module, "ComputeCapability"):
            return Library(candidate, module, _make_log(module))
    raise MissingExtraError("TensorRT" if name is None else name, "tensorrt" if name == "tensorrt" else TENSORRT_EXTRA)


def gpu_here() -> tuple[str, str] | None:
    """Compute capability ("8.6") and name of the NVIDIA GPU that PyTorch sees; None where it sees none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}", torch.cuda.get_device_name()


def parse_capability(text: str | float) -> str:
    """Convert 8.6, "8.6", "SM86" or "sm_86" to the compute capability "8.6"; raise `UserError` for anything else."""
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", str(text), re.IGNORECASE)
    if match is None:
        raise UserError(f"{text!r} is no compute capability.", "Give one such as 8.6.")
    return f"{match[1]}.{match[2]}"


def _make_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Logger that keeps the last error and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.last_error = message

    return Log()
