"""First-fit packing and mixtures: against plain loops, exhaustive search and closed forms."""

import itertools
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from garrulax.train import settings
from garrulax.train.components import Component
from garrulax.train.documents import causal_packing
from garrulax.train.feed import Feed
from garrulax.train.mixing import deal, fractions
from garrulax.train.packing import first_fit_decreasing
from garrulax.train.sources import Weighted, mixture, split_sources
from garrulax.train.tokens import Tokens


def by_loop(sizes, capacity):
    bins, free = np.empty(len(sizes), int), []
    for item in np.argsort(-sizes, kind="stable"):
        place = next((b for b, room in enumerate(free) if room >= sizes[item]), len(free))
        free += [capacity] * (place == len(free))
        free[place] -= sizes[item]
        bins[item] = place
    return bins


def fewest_bins(sizes, capacity):
    """By trying every way to put the items into bins."""

    def fit(left, free):
        if not left:
            return True
        return any(fit(left[1:], (*free[:i], room - left[0], *free[i + 1 :])) for i, room in enumerate(free)
                   if room >= left[0] and room not in free[:i])  # fmt: skip

    return next(n for n in itertools.count(1) if fit(sorted(sizes, reverse=True), (capacity,) * n))


def test_first_fit_decreasing_is_the_loop_and_near_the_optimum():
    rng = np.random.default_rng(0)
    for _ in range(200):
        capacity = int(rng.integers(1, 40))
        sizes = rng.integers(1, capacity + 1, rng.integers(1, 60))
        np.testing.assert_array_equal(first_fit_decreasing(sizes, capacity), by_loop(sizes, capacity))
    for _ in range(60):
        sizes = rng.integers(2, 21, 9)
        used = first_fit_decreasing(sizes, 20).max() + 1
        best = fewest_bins(sizes.tolist(), 20)
        assert best <= used <= 11 / 9 * best + 6 / 9  # Dosa 2007
    with pytest.raises(ValueError, match="sizes from 1 to 9 do not fit into bins of 8"):
        first_fit_decreasing(np.array([1, 9]), 8)


def text(lengths):
    return Tokens([np.arange(sum(lengths), dtype=np.uint16)], 1, np.concatenate([[0], np.cumsum(lengths)]))


def test_every_target_is_in_one_packed_row():
    lengths = np.random.default_rng(1).integers(1, 90, 200)
    tokens = text(lengths)
    packing = causal_packing(tokens, 32, seed=3)
    targets = np.concatenate([s + 1 + np.arange(n) for s, n in zip(packing.starts, packing.sizes, strict=True)])
    firsts = tokens.documents[:-1]
    assert sorted([*targets, *firsts]) == list(range(len(tokens)))
    rows = np.add.reduceat(packing.sizes, packing.rows[:-1])
    assert rows.max() <= 32
    assert packing.waste == pytest.approx(1 - rows.sum() / (32 * len(packing)))
    assert (packing.starts != causal_packing(tokens, 32, seed=4).starts).any(), "documents are shuffled"
    np.testing.assert_array_equal(packing.starts, causal_packing(tokens, 32, seed=3).starts)
    with pytest.raises(ValueError, match="nothing to pack"):
        causal_packing(text([1, 1]), 32, seed=0)


def test_little_is_wasted_on_the_standard_library():
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for folder in (root, root / "json", root / "asyncio", root / "email") for f in folder.glob("*.py")]
    sizes = [f.stat().st_size // 3 + 2 for f in files]  # about three bytes a token
    assert causal_packing(text(sizes), 1024, seed=0).waste < 0.02


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [0.5, 0.3, 0.15, 0.05], [5, 0, 3, 0], [1e-3, 1]])
def test_every_corpus_has_its_share_after_any_number_of_rows(weights):
    rows = np.arange(20_000)
    corpus, index = deal(rows, fractions(weights))
    shares = np.array(weights) / sum(weights)
    for number, share in enumerate(shares):
        had = np.cumsum(corpus == number)
        assert np.abs(had - share * (rows + 1)).max() < 1.5 * (share > 0) + 1e-9
        np.testing.assert_array_equal(index[corpus == number], np.arange(had[-1]))
    shuffled = np.random.default_rng(0).permutation(rows)
    np.testing.assert_array_equal(deal(shuffled, fractions(weights))[0], corpus[shuffled])
    if len(weights) == 2:
        np.testing.assert_allclose(np.cumsum(corpus == 0), np.floor(shares[0] * (rows + 1) + 0.5), atol=1)


def component(rows, number):
    def make(place, example):
        return {"tokens": np.stack([place, example, np.full_like(place, number)], 1)}

    return Component(rows, lambda example: example % rows, make, lambda: iter([{"tokens": number}] * rows))


def test_a_feed_is_a_function_of_the_step(monkeypatch):
    parts = [component(7, 0), component(3, 1), component(5, 2)]
    weights = [0.5, 0.25, 0.25]
    whole = [Feed(parts, weights, 8).batch_at(step)["tokens"] for step in range(300)]
    np.testing.assert_array_equal(Feed(parts, weights, 8).batch_at(250)["tokens"], whole[250])
    for batch in whole:
        assert np.bincount(batch[:, 2]).tolist() == [4, 2, 2]
    seen = np.concatenate(whole)
    np.testing.assert_array_equal(seen[seen[:, 2] == 1][:, 1], np.arange(600))
    assert [b["tokens"] for b in Feed(parts, weights, 8).held_out()] == [0, 1, 2] * 3 + [0, 2] * 2 + [0] * 2
    monkeypatch.setattr("jax.process_count", lambda: 2)
    halves = []
    for index in range(2):
        monkeypatch.setattr("jax.process_index", lambda index=index: index)
        halves.append(Feed(parts, weights, 8).batch_at(3)["tokens"])
    np.testing.assert_array_equal(np.concatenate(halves), whole[3])


def test_weights_of_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:1").write_text("x")
    (tmp_path / "b, c.txt").write_text("x")
    assert split_sources("a:1:0.5,b, c.txt:2,gs://x/*.jsonl:.5") == ["a:1:0.5", "b, c.txt:2", "gs://x/*.jsonl:.5"]
    assert mixture(["a:1:0.5", "gs://x/y:2e-1"]) == [Weighted("a:1", 0.5), Weighted("gs://x/y", 0.2)]
    assert mixture(["u:2x", "v:1x"]) == [Weighted("u", 2, True), Weighted("v", 1, True)]
    assert mixture(["a:1", "b, c.txt"]) == []
    s = settings.absolute_paths(settings.Settings(corpus=("b, c.txt:2", "memory://m:1")))
    assert s.corpus == (f"{tmp_path}/b, c.txt:2", "memory://m:1")


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (("a:-1", "b:1"), "a weight must be a number that is not negative"),
        (("a:nan", "b:1"), "a weight must be a number that is not negative"),
        (("a:0", "b:0.0"), "all weights are zero"),
        (("a:1", "b"), "b has no weight"),
        (("a:1x", "b:1"), "use one kind"),
    ],
)
def test_wrong_weights_are_refused(corpus, message):
    with pytest.raises(ValueError, match=message):
        settings.Settings(corpus=corpus)
