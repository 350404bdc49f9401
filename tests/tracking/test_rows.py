"""Files of one JSON object a line."""

import resource

import pytest

from plrd_train.tracking.rows import append_row, read_rows


def test_a_line_that_fits_in_part_is_an_error_and_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"step": 0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            append_row(path, {"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_rows(path) == [{"step": 0}]
