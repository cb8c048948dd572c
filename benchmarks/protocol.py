"""What every benchmark writes: figures, protocol, machine and versions, as JSON beside the script."""

from __future__ import annotations

import json
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exporters.machine import cores, processor


def write(name: str, protocol: str, results: Any) -> None:
    """Write `benchmarks/NAME.json` and say so."""
    path = Path(__file__).with_name(f"{name}.json")
    content = {
        "protocol": protocol,
        "date": date.today().isoformat(),
        "machine": {"cpu": processor(), "cores": cores(), "threads": torch.get_num_threads(), "shared": True},
        "versions": {name: version(name) for name in ("selfpruner-hub", "torch", "transformers")},
        "results": results,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path.name}")
