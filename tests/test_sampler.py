"""The sampler: every window once an epoch, any step at any time, the same order for any number of processes."""

import time

import numpy as np
import pytest

from garrulax.train.sampler import Sampler, eval_windows, permute
from garrulax.train.tokens import Tokens


def text(size):
    return np.arange(size, dtype=np.uint32)


def windows_of(sampler, steps):
    return np.concatenate([sampler.batch_at(s) for s in steps])


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 256, 1000, 12345])
def test_permute_is_a_bijection(size):
    for epoch in range(3):
        order = permute(np.arange(size), size, seed=5, epoch=epoch)
        assert np.array_equal(np.sort(order), np.arange(size))


def test_permute_looks_random():
    size = 10_000
    orders = [permute(np.arange(size), size, seed, epoch) for seed in (0, 1, -1, 1337) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        fixed = (order == np.arange(size)).sum()
        assert fixed < 10, "about one fixed point is expected"
        rank = np.corrcoef(order, np.arange(size))[0, 1]
        assert abs(rank) < 5 / np.sqrt(size)
        steps = np.diff(order)
        assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.05, "that of a random permutation's steps"
        assert len(np.unique(steps)) > 5000, "an affine map has few differences"
        for other in orders[:i]:
            assert (order == other).mean() < 0.01


@pytest.mark.parametrize(
    ("size", "window", "batch"), [(1000, 10, 7), (1009, 16, 8), (4097, 64, 4), (200, 7, 64), (20000, 4, 64)]
)
def test_every_window_once_an_epoch(size, window, batch):
    sampler = Sampler(text(size), window, batch, seed=3)
    n = sampler.windows_per_epoch
    assert size - 2 * window <= n * window < size
    rows = windows_of(sampler, range(-(-3 * n // batch)))
    assert rows.dtype == np.int32
    assert rows.shape[1] == window + 1
    assert (np.diff(rows, axis=1) == 1).all(), "a window is consecutive text"
    offsets = []
    for epoch in range(3):
        starts = np.sort(rows[epoch * n : (epoch + 1) * n, 0])
        assert (np.diff(starts) == window).all(), "windows tile the text"
        assert starts[0] < 2 * window
        offsets.append(starts[0])
        assert not np.array_equal(starts, rows[epoch * n : (epoch + 1) * n, 0]), "they are shuffled"
    assert len(set(offsets)) > 1, "the cuts move"


def test_offsets_reach_all_of_the_text():
    sampler = Sampler(text(205), window=10, batch=19, seed=0)
    seen = np.unique(windows_of(sampler, range(200)))
    assert np.array_equal(seen, np.arange(205))


def test_a_step_needs_nothing_but_its_number():
    sampler = Sampler(text(5000), 16, 6, seed=1)
    expected = [sampler.batch_at(s) for s in range(2000)]
    for step in (1999, 0, 700, 1365, 682, 683):
        np.testing.assert_array_equal(Sampler(text(5000), 16, 6, seed=1).batch_at(step), expected[step])
        np.testing.assert_array_equal(sampler.batch_at(step), expected[step])
    assert sampler.batch_at(10**9).shape == (6, 17)
    assert not np.array_equal(Sampler(text(5000), 16, 6, seed=2).batch_at(0), expected[0])


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_share_the_single_process_batch(count):
    whole = Sampler(text(999), 8, 12, seed=4)
    parts = [Sampler(text(999), 8, 12, 4, index, count) for index in range(count)]
    for step in (0, 1, 9, 10, 345):
        np.testing.assert_array_equal(np.concatenate([p.batch_at(step) for p in parts]), whole.batch_at(step))
        examples = np.concatenate([p.examples_at(step) for p in parts])
        assert examples.tolist() == list(range(12 * step, 12 * step + 12))


def test_shards_do_not_change_batches():
    whole = Sampler(text(3000), 10, 5, seed=0)
    cut = Sampler(Tokens(np.split(text(3000), [5, 500, 2222]), 0, np.array([0, 3000])), 10, 5, seed=0)
    for step in range(300):
        np.testing.assert_array_equal(whole.batch_at(step), cut.batch_at(step))


@pytest.mark.parametrize("size", [2, 10, 11, 12, 101, 95])
def test_evaluation_predicts_every_token_once(size):
    predicted = np.zeros(size)
    for process in range(2):
        for windows, weights in eval_windows(text(size), 10, 4, process, 2):
            assert windows.shape == (2, 11)
            assert weights.shape == (2, 10)
            counted = weights > 0
            np.testing.assert_array_equal(windows[:, 1:][counted], windows[:, :-1][counted] + 1)
            np.add.at(predicted, windows[:, 1:][counted], weights[counted])
    assert predicted.tolist() == [0] + [1] * (size - 1)


def test_the_shortest_text():
    sampler = Sampler(text(11), 10, 2, seed=0)
    np.testing.assert_array_equal(sampler.batch_at(5), [np.arange(11)] * 2)
    with pytest.raises(ValueError, match=r"has 10 tokens, fewer than one window of 10 \+ 1: use a smaller window"):
        Sampler(text(10), 10, 2)


def test_bad_input():
    with pytest.raises(ValueError, match="batch of 5 cannot be shared by 2"):
        Sampler(text(100), 4, 5, process_count=2)
    with pytest.raises(ValueError, match="cannot be shared"):
        Sampler(text(100), 4, 4, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="must be positive"):
        Sampler(text(100), 0, 5)
    with pytest.raises(ValueError, match="must not be negative"):
        Sampler(text(100), 4, 5).batch_at(-1)
    with pytest.raises(ValueError, match="too few to evaluate"):
        next(eval_windows(text(1), 4, 2))
    with pytest.raises(ValueError, match="cannot be shared"):
        next(eval_windows(text(9), 4, 3, 0, 2))


def test_speed(tmp_path):
    """Far above any model's appetite. Measured on an idle core: 600 M tokens/s; the bound allows for a busy machine."""
    np.random.default_rng(0).integers(0, 2**16, 2**24).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    sampler = Sampler(np.memmap(tmp_path / "tokens.bin", np.uint16, "r"), 1024, 8, seed=0)
    for step in range(2048):
        sampler.batch_at(step)
    start = time.perf_counter()
    for step in range(1000):
        sampler.batch_at(step)
    assert 1000 * 8 * 1024 / (time.perf_counter() - start) > 20e6
