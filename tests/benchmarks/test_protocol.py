"""What the benchmarks share."""

from __future__ import annotations

from protocol import Rows


def test_rows_are_there_again(tmp_path):
    file = tmp_path / "work" / "rows.jsonl"
    rows = Rows(file)
    assert rows == []
    rows.keep({"runtime": "onnx", "beta": 0.3})
    again = Rows(file)
    assert again == rows == [{"runtime": "onnx", "beta": 0.3}]
    assert again.have(runtime="onnx")
    assert not again.have(runtime="onnx", beta=0.5)
