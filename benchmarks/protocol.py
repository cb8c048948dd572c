"""What every benchmark writes: figures, protocol, machine and versions, as JSON beside the script."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def write(name: str, protocol: str, results: Any) -> None:
    """Write `benchmarks/NAME.json` and say so."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    path = Path(__file__).with_name(f"{name}.json")
    content = {
        "protocol": protocol,
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "shared": True},
        "versions": {name: version(name) for name in ("selfpruner-hub", "torch", "transformers")},
        "results": results,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path.name}")
