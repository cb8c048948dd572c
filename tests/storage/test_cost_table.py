"""Tables of costs: fitted to what was measured, and kept for the next run."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.target import target_of
from selfpruner_hub.storage import cost_table
from selfpruner_hub.storage.cost_table import CostTable, Point, keep_table, read_table

SHAPE = ModelShape(32, 8, 2, Plan.of([100] * 10, [4] * 10))
KEY = {"runtime": "onnx", "intermediate_size": [100] * 10, "version": "1"}
REQUEST = target_of({"speedup": 1.5}, "onnx", (64, 8))


def points(group=3.0, channel=0.2, constant=40.0, decode=0.25):
    """Models of ten and four layers: a KV group takes 3 ms of the prompt, a channel 0.2, a quarter for a token."""

    def point(layers, groups, channels):
        work = layers * (group * groups + channel * channels)
        return Point(layers, groups, channels, constant + work, decode * work, round(1000 * work) + 77)

    return [point(10, 4, 100), point(4, 4, 100), point(4, 1, 100), point(4, 2, 100), point(4, 4, 60), point(4, 4, 30)]


def test_linear_costs_are_found_again():
    costs = CostTable(KEY, tuple(points())).costs(SHAPE, REQUEST)
    request = 1 + REQUEST.new_tokens * 0.25
    assert costs.constant == pytest.approx(40)
    for table, unit in ((costs.attention[0], 3.0), (costs.ffn[9], 0.2)):
        assert table == pytest.approx(request * unit * np.arange(len(table)))
    size = CostTable(KEY, tuple(points())).costs(SHAPE, target_of({"memory": 0.5}, "onnx"))
    assert (size.unit, size.constant) == ("bytes", pytest.approx(77))
    assert size.ffn[0][50] == pytest.approx(10_000)


def test_layers_that_are_narrower_than_the_measured_ones_cost_less():
    """As in a model that was pruned before."""
    uneven = replace(SHAPE, dense=Plan.of([100] * 5 + [50] * 5, [4, 2] * 5))
    costs = CostTable(KEY, tuple(points())).costs(uneven, target_of({"memory": 0.5}, "onnx"))
    assert costs.constant == pytest.approx(77)
    assert costs.dense == pytest.approx(77 + 1000 * (3.0 * 30 + 0.2 * 750))


def test_every_measured_width_counts():
    """One that is off moves the slope of its part, and by less than what it is off; not that of the other part."""
    true, noisy = points(), points()
    noisy[3] = replace(true[3], prefill=true[3].prefill + 6)  # of 2 KV groups: as slow as the dense one
    costs, as_measured = (CostTable(KEY, tuple(each)).costs(SHAPE, REQUEST) for each in (noisy, true))
    assert 0.8 * as_measured.group(0) < costs.group(0) < as_measured.group(0)
    assert costs.channel(0) == pytest.approx(as_measured.channel(0))
    assert costs.dense == as_measured.dense == true[0].cost(REQUEST)


def test_a_part_that_is_not_seen_to_save_anything_costs_nothing():
    slower = [replace(p, prefill=1e3, decode=1e3) if p.intermediate_size < 100 else p for p in points()]
    costs = CostTable(KEY, tuple(slower)).costs(SHAPE, REQUEST)
    assert not costs.ffn[0].any()
    assert costs.group(0) > 0
    assert costs.dense == slower[0].cost(REQUEST)


def test_attention_without_narrower_widths_costs_nothing():
    costs = CostTable(KEY, tuple(p for p in points() if p.num_key_value_heads == 4)).costs(SHAPE, REQUEST)
    assert not costs.attention[0].any()
    assert costs.ffn[0][-1] > 0


def test_a_table_is_kept_for_its_key_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_table(KEY) is None
    kept = keep_table(KEY, points())
    assert read_table(KEY) == kept
    assert read_table({**KEY, "version": "2"}) is None
    (file,) = cost_table.folder().iterdir()
    assert file.is_relative_to(tmp_path)
    for damage in ("{}", file.read_text()[:-40], file.read_text().replace('"prefill"', '"other"')):
        file.write_text(damage)
        assert read_table(KEY) is None
        with pytest.raises(SavedModelError):
            CostTable.from_json(damage, "table")


def test_a_table_that_cannot_be_kept_is_used(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "selfpruner_hub"):
        assert keep_table(KEY, points()) == CostTable(KEY, tuple(points()))
    assert read_table(KEY) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cost_table.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert (read_table(KEY), keep_table(KEY, points()).key) == (None, KEY)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all(line.startswith("The costs are measured again in the next run: ") for line in said)
