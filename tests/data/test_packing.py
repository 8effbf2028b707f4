"""The plan and the rows: every pair once and whole, the same for every host, full on both sides."""

import dataclasses
import itertools

import numpy as np
import pytest

from dslt.core.batch import PAD_ID, ROLE_LABEL, ROLE_RATIONALE
from dslt.data.packing import (
    PairOrder,
    RowShape,
    TokenTable,
    _insert,
    build_batch,
    plan_window,
)
from dslt.data.row_shape import suggest_row_shape
from dslt.errors import InputError


def random_lengths(pairs: int, seed: int = 0, has_rationale: float = 0.8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    source = rng.integers(5, 40, pairs)
    lengths = np.stack([source, rng.integers(2, 6, pairs), source, rng.integers(4, 30, pairs)], 1)
    lengths[rng.random(pairs) > has_rationale, 2:] = 0
    return lengths


def single(pairs: int, batch_examples: int = 8, seed: int = 0) -> PairOrder:
    return PairOrder((pairs,), (1.0,), batch_examples, seed)


def windows_until(order: PairOrder, positions: int) -> np.ndarray:
    windows = -(-positions // order.window_pairs)
    return np.concatenate([order.window(index) for index in range(windows)])


def test_each_epoch_is_another_permutation_of_all_pairs():
    order = single(100)
    seen = windows_until(order, 300)
    epochs = seen[:300].reshape(3, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs.tolist())
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    later_alone = single(100, seed=3).window(7)
    order = single(100, seed=3)
    for index in range(7):
        order.window(index)
    assert (order.window(7) == later_alone).all()
    assert (later_alone != single(100, seed=4).window(7)).any()


def test_the_order_is_the_same_on_every_machine_and_version():
    # PCG64 seeded with (0, dataset 0, epoch 0), sorted: a change here breaks resuming old runs.
    bits = np.random.PCG64(np.random.SeedSequence([0, 0, 0])).random_raw(10)
    assert single(10).window(0)[:10].tolist() == sorted(range(10), key=lambda i: bits[i])
    assert single(10).window(0)[:10].tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_a_window_is_an_epoch_at_most_unless_that_is_under_eight_batches():
    assert single(720, 64).window_batches == 11
    assert single(100_000, 64).window_batches == 32
    assert single(100_000, 1).window_batches == 128
    assert single(100, 64).window_batches == 8


@pytest.mark.parametrize(
    ("sizes", "rates"),
    [
        ((50, 30, 7), (50.0, 30.0, 7.0)),
        ((50, 30, 7), (1.0, 1.0, 2.0)),
        ((9, 9), (1.0, 1e-9)),
        ((5,) * 7, (1.0,) * 7),
    ],
)
def test_rates_hold_and_every_dataset_goes_through_whole_epochs(sizes, rates):
    order = PairOrder(sizes, rates, 4, 0)
    counts = np.array(order.dataset_positions(65_536))
    assert counts.sum() == 65_536
    assert np.abs(counts - np.array(rates) / sum(rates) * 65_536).max() <= 1
    assert order.dataset_positions(3 * 65_536) == (3 * counts).tolist()
    windows = 65_536 // order.window_pairs
    seen = np.concatenate([order.window(index) for index in range(windows)])
    counts = np.array(order.dataset_positions(windows * order.window_pairs))
    times = np.bincount(seen, minlength=sum(sizes))
    for number, part in enumerate(np.split(times, np.cumsum(sizes)[:-1])):
        assert part.sum() == counts[number]
        assert part.max() - part.min() <= 1  # nobody is a whole epoch ahead of another


def test_rates_are_evenly_spread():
    order = PairOrder((1000, 1000, 1000), (5.0, 3.0, 2.0), 10, 0)
    for position in range(0, 5000, 7):
        shares = np.array([0.5, 0.3, 0.2]) * position
        counts = order.dataset_positions(position)
        assert sum(counts) == position
        assert np.abs(counts - shares).max() < 2


@pytest.mark.parametrize(
    ("sizes", "rates", "batch_examples", "seed"),
    [((0,), (1.0,), 4, 0), ((3,), (0.0,), 4, 0), ((3,), (float("nan"),), 4, 0),
     ((3,), (1.0, 1.0), 4, 0), ((3,), (1.0,), 0, 0), ((3,), (1.0,), 4, -1)],
)  # fmt: skip
def test_an_order_that_cannot_be_is_refused(sizes, rates, batch_examples, seed):
    with pytest.raises(InputError):
        PairOrder(sizes, rates, batch_examples, seed)


@pytest.fixture(scope="module")
def planned():
    lengths = random_lengths(400)
    order = single(400, 25)
    window = lengths[order.window(0)]
    shape = suggest_row_shape(order, lengths, source_length=128)
    return window, shape, order.window_batches, plan_window(window, shape, 16, key=(0, 0))


def test_every_segment_is_planned_once_and_pairs_share_a_batch(planned):
    window, _, batches, plan = planned
    segments = plan.segments
    assert batches == 16 and not plan.left_out.size
    for which, role in ((0, ROLE_LABEL), (1, ROLE_RATIONALE)):
        mine = segments.where(segments.role == role)
        assert sorted(mine.pair) == np.flatnonzero(window[:, 2 * which]).tolist()
        assert (mine.source_length == window[mine.pair, 2 * which]).all()
        assert (mine.target_length == window[mine.pair, 2 * which + 1]).all()
    is_label = segments.role == ROLE_LABEL
    batch_of_pair = np.full(len(window), -1)
    batch_of_pair[segments.pair[is_label]] = segments.batch[is_label]
    assert (batch_of_pair[segments.pair] == segments.batch).all()


def test_segments_lie_behind_one_another_inside_their_rows(planned):
    _, shape, _, plan = planned
    assert plan.segments.row.max() < shape.rows
    for place in {*zip(plan.segments.batch, plan.segments.row, strict=True)}:
        row = plan.segments.where(
            (plan.segments.batch == place[0]) & (plan.segments.row == place[1])
        )
        assert row.segment_id.tolist() == list(range(1, len(row.pair) + 1))
        for start, length, limit in (
            (row.source_start, row.source_length, shape.source_length),
            (row.target_start, row.target_length, shape.target_length),
        ):
            assert start[0] == 0 and (start[1:] == (start + length)[:-1]).all()
            assert start[-1] + length[-1] <= limit


def test_a_plan_depends_on_its_key_only_in_the_order_of_batches(planned):
    window, shape, batches, plan = planned
    again = plan_window(window, shape, batches, key=(0, 0)).segments
    other = plan_window(window, shape, batches, key=(0, 1)).segments
    for field in dataclasses.fields(again):
        assert (getattr(again, field.name) == getattr(plan.segments, field.name)).all()
    assert (other.batch != plan.segments.batch).any()


def test_batches_are_neither_sorted_by_length_nor_uneven(planned):
    window, _, batches, plan = planned
    segments = plan.segments
    tokens = np.bincount(segments.batch, segments.source_length, batches)
    assert tokens.std() < 0.02 * tokens.mean()
    longest = [segments.source_length[segments.batch == batch].max() for batch in range(batches)]
    assert min(longest) > 0.8 * window.max()


def test_what_fits_nowhere_is_left_out_and_told():
    lengths = np.array([[8, 2, 8, 4], [6, 2, 0, 0], [8, 2, 8, 4]])
    plan = plan_window(lengths, RowShape(2, 8, 8), batches=1, key=(0,))
    assert len(plan.left_out) == 2
    left = set(range(3)) - set(plan.left_out.tolist())
    assert set(plan.segments.pair.tolist()) == left  # never half a pair
    assert not plan_window(lengths, RowShape(5, 8, 8), 1, (0,)).left_out.size


def test_an_evicted_pair_goes_where_both_its_segments_have_room():
    sizes = np.array([[[6, 2], [6, 4]]])  # one pair
    room = np.array([[[9, 3], [9, 9]], [[9, 9], [5, 9]], [[7, 7], [8, 4]]])  # 3 batches of 2 rows
    pair_batch, segment_row = np.array([0]), np.array([[-1, -1]])
    room[0, 0] = 0
    assert _insert(0, sizes, pair_batch, segment_row, room)
    assert pair_batch.tolist() == [2] and segment_row.tolist() == [[1, 0]]
    assert room[2].tolist() == [[1, 3], [2, 2]]
    assert not _insert(0, sizes, pair_batch, segment_row, room)  # now nobody has room


def tables_of(lengths: np.ndarray) -> list[TokenTable]:
    """Tokens that tell where they come from: 1000 * pair + position, in each of four tables."""
    tables = []
    for column in lengths.T:
        tokens = [1000 * (pair + 1) + np.arange(length) for pair, length in enumerate(column)]
        offsets = np.concatenate([[0], np.cumsum(column)])
        tables.append(TokenTable(np.concatenate(tokens).astype(np.int32), offsets))
    return tables


def batches_of(planned, rows=None):
    window, shape, batches, plan = planned
    tables = tables_of(window)
    for batch in range(batches):
        segments = plan.segments.where(plan.segments.batch == batch)
        sources = []
        for role, pair_of_tables in ((ROLE_LABEL, tables[:2]), (ROLE_RATIONALE, tables[2:])):
            index = np.flatnonzero(segments.role == role)
            sources.append((index, segments.pair[index], *pair_of_tables))
        yield build_batch(segments, sources, shape, rows)


def test_unpacking_the_rows_gives_back_every_token_of_the_window(planned):
    window = planned[0]
    found = []
    for batch in batches_of(planned):
        for row in range(len(batch.encoder_input_tokens)):
            for segment in range(1, batch.encoder_segment_ids[row].max() + 1):
                is_source = batch.encoder_segment_ids[row] == segment
                is_target = batch.decoder_segment_ids[row] == segment
                for mask in (is_source, is_target):  # contiguous
                    assert np.ptp(np.flatnonzero(mask)) == mask.sum() - 1
                source = batch.encoder_input_tokens[row][is_source]
                target = batch.decoder_target_tokens[row][is_target]
                (role,) = set(batch.decoder_loss_roles[row][is_target])
                pair = source[0] // 1000 - 1
                assert source.tolist() == (1000 * (pair + 1) + np.arange(len(source))).tolist()
                assert target.tolist() == (1000 * (pair + 1) + np.arange(len(target))).tolist()
                inputs = batch.decoder_input_tokens[row][is_target]
                assert inputs.tolist() == [PAD_ID, *target[:-1]]
                assert (batch.decoder_loss_weights[row][is_target] == 1).all()
                which = 0 if role == ROLE_LABEL else 2
                assert (len(source), len(target)) == tuple(window[pair, which : which + 2])
                found.append((pair, role))
    expected = {(p, ROLE_LABEL) for p in range(len(window))}
    expected |= {(p, ROLE_RATIONALE) for p in np.flatnonzero(window[:, 2])}
    assert len(found) == len(expected) and set(found) == expected


def test_a_pairs_targets_have_one_example_id_in_whatever_rows_they_lie(planned):
    """And no two pairs of a batch have the same; the numbers begin at 1 without a gap."""
    for batch in batches_of(planned):
        ids = {}
        for row in range(len(batch.encoder_input_tokens)):
            is_target = batch.decoder_segment_ids[row] > 0
            pairs = batch.decoder_target_tokens[row][is_target] // 1000
            for pair, number in zip(pairs, batch.decoder_example_ids[row][is_target], strict=True):
                assert ids.setdefault(pair, number) == number
            assert not batch.decoder_example_ids[row][~is_target].any()
        assert sorted(ids.values()) == list(range(1, len(ids) + 1))


def test_what_is_no_segment_is_zero_in_every_array(planned):
    for batch in batches_of(planned):
        is_padding = batch.encoder_segment_ids == 0
        assert not batch.encoder_input_tokens[is_padding].any()
        is_padding = batch.decoder_segment_ids == 0
        for array in batch[2:]:
            assert not array[is_padding].any()


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_build_the_rows_that_one_host_would(planned, hosts):
    rows = planned[1].rows
    bounds = np.linspace(0, rows, hosts + 1).astype(int)
    shares = [list(batches_of(planned, np.arange(*pair))) for pair in itertools.pairwise(bounds)]
    for whole, *parts in zip(batches_of(planned), *shares, strict=True):
        for name in whole._fields:
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert (joined == getattr(whole, name)).all()
            assert joined.dtype == getattr(whole, name).dtype
