"""The benchmark of mixtures, on one that is trained for a moment; and on the real bed, what it is there to show."""

from __future__ import annotations

import json

import experts
import pytest
import torch
from trained_mixture import texts, tokenizer_of, windows_of


@pytest.mark.slow
def test_own_counts_and_repair_leave_half_of_what_reap_loses(tmp_path, monkeypatch):
    """Of a mixture that was trained here, so that its routing is real: it takes about a minute."""
    methods = ("random", "REAP", "REAP-sum", "REAP-sum, own counts")
    monkeypatch.setattr(experts, "METHODS", {name: experts.METHODS[name] for name in methods})
    monkeypatch.setattr(experts, "SHARES", (0.5, 0.75))
    experts.main([str(tmp_path / "work"), "--seeds", "0", "--steps", "150", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "experts.json").read_text())["results"]
    lost = {(row["share"], row["method"], row["repaired"]): row["kl"] for row in rows}
    for share in (0.5, 0.75):
        ours, reap = lost[share, "REAP-sum, own counts", True], lost[share, "REAP", False]
        assert 0 <= ours < 0.5 * reap
        assert ours < lost[share, "REAP-sum", True] * 1.1
        assert lost[share, "REAP-sum, own counts", False] < lost[share, "random", False]
        for method in experts.METHODS:
            assert lost[share, method, True] < lost[share, method, False]


def test_a_stopped_benchmark_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "SHARES", (0.5,))
    monkeypatch.setattr(experts, "METHODS", {"REAP": ("reap", True), "REAP-sum, own counts": ("reap-sum", False)})
    monkeypatch.setattr(experts, "CALIBRATION", 16)
    monkeypatch.setattr(experts, "FISHER", 8)
    monkeypatch.setattr(experts, "MEASURED", 4)
    words = [str(tmp_path / "work"), "--seeds", "3", "--steps", "2", "--output", str(tmp_path)]
    experts.main(words)
    first = json.loads((tmp_path / "experts.json").read_text())["results"]
    assert [row["method"] for row in first if row["repaired"]] == ["REAP", "REAP-sum, own counts"]
    rows = [json.loads(line) for line in (tmp_path / "work" / "rows.jsonl").read_text().splitlines()]
    assert all(row["removed"] == pytest.approx(0.5, abs=0.01) for row in rows)
    assert len(set(rows[1]["experts"])) >= len(set(rows[0]["experts"])) == 1
    monkeypatch.setattr(experts, "trained_mixture", None)  # nothing is trained again
    experts.main(words)
    assert json.loads((tmp_path / "experts.json").read_text())["results"] == first


def test_the_text_is_split_by_topic():
    known, unseen = texts()
    assert len(known) > 4 * len(unseen) > 200_000
    tokenizer = tokenizer_of(known[:50_000])
    windows = windows_of(unseen[:20_000], tokenizer)
    assert windows.shape[1] == 128
    assert torch.equal(windows, windows_of(unseen[:20_000], tokenizer))
    assert windows.max() < 1024
