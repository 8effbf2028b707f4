"""The batch's arrays and the rows of padding that make devices divide it."""

import numpy as np
import pytest

from dslt.core.batch import (
    ROLE_LABEL,
    ROLE_RATIONALE,
    Batch,
    count_targets,
    empty_batch,
    pad_rows,
)


def test_empty_batch_is_padding_of_the_stated_shapes_and_types():
    batch = empty_batch(3, 5, 4)
    for name, array in batch._asdict().items():
        assert array.shape == ((3, 5) if name.startswith("encoder") else (3, 4)), name
        assert array.dtype == (np.float32 if name.endswith("weights") else np.int32), name
        assert not array.any(), name


def test_fields_of_an_empty_batch_share_no_memory():
    batch = empty_batch(1, 4, 4)  # the same shape throughout
    for array in batch:
        array[:] = 1
        assert sum(other.sum() for other in batch) == 4
        array[:] = 0


@pytest.mark.parametrize(("rows", "multiple", "expected"), [(5, 4, 8), (1, 8, 8), (3, 2, 4)])
def test_pad_rows_appends_rows_without_segments_or_weight(build_batch, rows, multiple, expected):
    segments = [([5, 6], [7, 1], ROLE_LABEL), ([5], [8, 1], ROLE_RATIONALE)]
    batch = build_batch([segments] * rows, 4, 6)
    padded = pad_rows(batch, multiple)
    for before, after in zip(batch, padded, strict=True):
        assert after.dtype == before.dtype
        assert after.shape == (expected, *before.shape[1:])
        np.testing.assert_array_equal(after[:rows], before)
        assert not after[rows:].any()


def test_pad_rows_leaves_a_multiple_alone():
    batch = empty_batch(6, 2, 2)
    assert pad_rows(batch, 3) is batch
    assert isinstance(pad_rows(batch, 4), Batch)


def test_count_targets_of_a_role(build_batch):
    label, rationale = ([5], [7, 1], ROLE_LABEL), ([6], [8, 8, 1], ROLE_RATIONALE)
    batch = build_batch([[label, rationale, label], [rationale], [label]], 4, 8)
    batch = pad_rows(batch, 5)
    assert count_targets(batch, ROLE_LABEL) == 3
    assert count_targets(batch, ROLE_RATIONALE) == 2
    batch.decoder_segment_ids[0, 2:5] = 1  # the rationale now shares the label's source
    assert count_targets(batch, ROLE_LABEL) == 3
    assert count_targets(batch, ROLE_RATIONALE) == 2
