"""Memory does not grow with the text of the records: `scale.py` at a reduced count."""

import pytest
import scale


@pytest.mark.parametrize("stage", ["read and validate", "inputs of an evaluation"])
def test_a_row_costs_less_memory_than_its_text(stage, tmp_path):
    """290 bytes a row at 100,000 rows, which is its id and its line; the text would be 270 more."""
    peaks = {}
    for rows in (2_000, 30_000):
        scale.write_records(tmp_path / "records.jsonl", rows)
        count, _, peaks[rows] = scale.measure(
            tmp_path / "records.jsonl", stage, scale.STAGES[stage]
        )
        assert count == (rows if stage == "read and validate" else 2 * scale.HELD_OUT)
    assert (peaks[30_000] - peaks[2_000]) / 28_000 < 500
