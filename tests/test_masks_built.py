"""Every builder of kernels.masks against plain loops over pairs, and what its blocks cost."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from garrulax.kernels import masks
from garrulax.kernels.blocks import block_map
from garrulax.kernels.mask import INF, PAD
from garrulax.train.infill import infill_batch
from garrulax.train.infill_tokens import InfillTokens

pytestmark = pytest.mark.usefixtures("quick_compilation")
T = 12
SEGMENT = jnp.zeros((1, 8), int)
quick = settings(max_examples=15, deadline=None)


def seen(mask):
    return np.asarray(mask.dense())


@st.composite
def rows(draw, length=T):
    """The segments of a row: documents and stretches of padding in any order."""
    lengths = draw(st.lists(st.integers(1, length), min_size=1, max_size=6))
    pads = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    row = [PAD if pad else i for i, (n, pad) in enumerate(zip(lengths, pads, strict=True)) for _ in range(n)]
    row += [PAD if draw(st.booleans()) else len(lengths)] * (length - len(row))
    return row[:length]


def documents(row):
    """(first, stop) of the documents of a row."""
    runs = [list(run) for _, run in itertools.groupby(range(len(row)), lambda i: row[i])]
    return [(run[0], run[-1] + 1) for run in runs if row[run[0]] != PAD]


def with_positions(mask):
    """Counted along the row: within a document the distances are the same."""
    return mask.replace(query={**mask.query, "position": mask.query["rank"]})


def pairs(row, sees):
    """bool [T, T]: whether sees(i, j, length), in places within a document, for the pairs of every document."""
    out = np.zeros((len(row), len(row)), bool)
    for first, stop in documents(row):
        for i, j in itertools.product(range(stop - first), repeat=2):
            out[first + i, first + j] = sees(i, j, stop - first)
    return out


#: The masks of a segment alone, and whether a document's i-th token sees its j-th.
PAIRS = {
    "packed": (masks.packed, lambda i, j, n: j <= i),
    "bidirectional": (masks.bidirectional, lambda i, j, n: True),
    "window": (lambda s: masks.window(s, 3), lambda i, j, n: j in (i, i - 1, i - 2)),
    "strided": (lambda s: masks.strided(s, 2, 4), lambda i, j, n: j in (i, i - 1) or j in range(i, -1, -4)),
    # Child et al. 4.3: the own block, and those j with j mod l in {l - c, ..., l - 1}.
    "fixed": (
        lambda s: masks.fixed(s, 4, 2),
        lambda i, j, n: j <= i and (math.floor(i / 4) == math.floor(j / 4) or j % 4 in (2, 3)),
    ),
    "sinks_and_window": (lambda s: masks.sinks_and_window(s, 2, 3), lambda i, j, n: j <= i and (j < 2 or i - j < 3)),
    "shifted_first_half": (lambda s: masks.shifted(s, 4)[0], lambda i, j, n: j in range(4 * (i // 4), i + 1)),
}


@pytest.mark.parametrize("name", PAIRS)
@quick
@given(row=rows())
def test_masks_of_packed_rows(name, row):
    build, sees = PAIRS[name]
    np.testing.assert_array_equal(seen(build(jnp.array([row])))[0], pairs(row, sees))


@pytest.mark.parametrize("group", [2, 4, 6, 5])
@quick
@given(row=rows())
def test_shifted_groups_are_cut_as_the_authors_cut_them(group, row):
    """dvlab-research/LongLoRA forward_flashattn gives FlashAttention the ends of the sequences that it is to keep
    apart: group // 2 and every `group` from there, and the end of the text."""

    def sees(i, j, n):
        cuts = [0, *range(group // 2, n, group), n]
        return j <= i and any(a <= j and i < b for a, b in itertools.pairwise(cuts))

    np.testing.assert_array_equal(seen(masks.shifted(jnp.array([row]), group)[1])[0], pairs(row, sees))


def test_causal():
    np.testing.assert_array_equal(seen(masks.causal(2, 5)), np.tril(np.ones((2, 5, 5), bool)))
    np.testing.assert_array_equal(seen(masks.causal_from(jnp.zeros((2, 5), int))), np.tril(np.ones((2, 5, 5), bool)))
    np.testing.assert_array_equal(masks.causal_from(jnp.zeros((1, 3), int), 4).query["rank"], [[4, 5, 6]])


def test_only_what_is_always_causal_says_so():
    """Libraries without streams go by it."""
    built = {name: build(SEGMENT) for name, (build, _) in PAIRS.items()}
    built |= {"causal": masks.causal(1, 8), "causal_from": masks.causal_from(SEGMENT)}
    built |= {"later": masks.causal_from(SEGMENT, 3), "traced": masks.causal_from(SEGMENT, jnp.int32(0))}
    built |= {"within": masks.within(masks.causal(1, 8).replace(query={"position": SEGMENT, "rank": SEGMENT}), 2)}
    assert [name for name, mask in built.items() if mask.causal] == ["causal", "causal_from"]


@quick
@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_padding_sees_nothing_and_is_not_seen(valid):
    valid = np.array([valid])
    expected = np.tril(np.ones((6, 6), bool)) & valid[0][:, None] & valid[0][None, :]
    np.testing.assert_array_equal(seen(masks.padded(jnp.asarray(valid)))[0], expected)


@pytest.mark.parametrize("context", [0, 1, 3, 6])
def test_prefix(context):
    """THUDM/GLM mpu/transformer.py: lower triangle, and columns below `sep` for every row."""
    expected = np.tril(np.ones((6, 6), bool))
    expected[:, :context] = True
    np.testing.assert_array_equal(seen(masks.prefix(jnp.array([context]), 6))[0], expected)


@quick
@given(row=rows(), share=st.floats(0, 1))
def test_infilling_in_packed_rows(row, share):
    """In every document what `prefix` is in a row of its own."""
    context, expected = np.zeros(T, bool), np.zeros((T, T), bool)
    for first, stop in documents(row):
        length = round(share * (stop - first))
        context[first : first + length] = True
        alone = np.tril(np.ones((stop - first, stop - first), bool))
        alone[:, :length] = True
        expected[first:stop, first:stop] = alone
    np.testing.assert_array_equal(seen(masks.infilling(jnp.array([row]), jnp.asarray(context[None])))[0], expected)


def test_infilling_has_the_ranks_of_training_rows():
    ids = InfillTokens(90, 91, 91, 91, 92, 93, 94, 95, np.zeros(128, bool))
    batch = infill_batch(np.arange(60).reshape(3, 20), range(3), 0, ids, 32)
    mask = masks.infilling(jnp.asarray(batch["segment"]), jnp.asarray(batch["rank"] == 0))
    real = batch["segment"] >= 0
    assert (batch["rank"] > 0).any()
    np.testing.assert_array_equal(np.asarray(mask.query["rank"])[real], batch["rank"][real])


@quick
@given(answers=st.lists(st.integers(0, 3), min_size=T, max_size=T))
def test_choices(answers):
    row = [0, 0, *sorted(answers)[:-4], PAD, PAD]  # a text, its answers, padding
    expected = [
        [PAD not in (p, q) and (q == 0 or (p == q and j <= i)) for j, q in enumerate(row)] for i, p in enumerate(row)
    ]
    np.testing.assert_array_equal(seen(masks.choices(jnp.array([row])))[0], expected)


@pytest.mark.parametrize("stride", [0, 3])
def test_within_takes_another_reach_for_every_layer_of_a_scan(stride):
    row = [0] * 5 + [PAD] + [1] * 6
    base = with_positions(masks.packed(jnp.array([row])))
    reaches = [1, 2, INF]
    _, got = jax.lax.scan(lambda _, r: (None, masks.within(base, r, stride).dense()[0]), None, jnp.array(reaches))
    for reach, layer in zip(reaches, got, strict=True):
        expected = pairs(row, lambda i, j, n, r=reach: j <= i and (i - j < r or (stride and (i - j) % stride == 0)))
        np.testing.assert_array_equal(layer, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "first", "near", "random"), [(2, 1, 1, 2), (1, 2, 0, 3), (3, 1, 2, 0), (2, 3, 1, 9)])
def test_bigbird(block, first, near, random):
    """Blocks as a whole; the first ones, the near ones and the right number of others, of the own document."""
    length = 40
    row = np.repeat([0, PAD, 1, 2], [19, 4, 12, 5])
    got = seen(masks.bigbird(jnp.array([row]), jax.random.key(3), block=block, first=first, near=near, random=random))[
        0
    ]
    own = np.zeros((length, length), bool)
    for start, stop in documents(row.tolist()):
        own[start:stop, start:stop] = True
        count = -(-(stop - start) // block)
        inside = got[start:stop, start:stop]
        of = np.arange(stop - start) // block
        map_ = np.zeros((count, count), bool)
        map_[of[:, None], of] = inside
        np.testing.assert_array_equal(inside, map_[of[:, None], of])  # all tokens of a block alike
        for i, j in np.ndindex(map_.shape):
            assert map_[i, j] or not (i < first or j < first or abs(i - j) <= near)
        for i in range(first, count):
            given_ = sum(j < first or abs(i - j) <= near for j in range(count))
            assert map_[i].sum() - given_ == min(random, count - given_)
    assert not (got & ~own).any()


def test_bigbird_draws_evenly():
    """Of 9 blocks, the last one draws 2 of the 6 in the middle: each a third of the time, whatever the other."""
    segment, draws = jnp.zeros((1, 9), int), 4000
    build = lambda key: masks.bigbird(segment, key, block=1, first=1, near=1, random=2).dense()[0, 8, 1:7]  # noqa: E731
    got = np.asarray(jax.jit(jax.vmap(build))(jax.random.split(jax.random.key(0), draws)))
    assert (got.sum(axis=1) == 2).all()
    together = np.einsum("ni,nj->ij", got, got, dtype=int)
    assert np.abs(np.diag(together) / draws - 1 / 3).max() < 5 * math.sqrt(2 / 9 / draws)
    others = together[~np.eye(6, dtype=bool)]
    assert np.abs(others / draws - 1 / 15).max() < 5 * math.sqrt(14 / 225 / draws)


@st.composite
def trees(draw):
    nodes = draw(st.sampled_from([1, 31, 90]))
    return [draw(st.integers(-1, i - 1)) for i in range(nodes)]


@quick
@given(parents=trees(), seed=st.integers(0, 99))
def test_tree(parents, seed):
    """A node's ancestors, by walking up; in slots of any order, among the text and empty slots."""
    nodes = list(range(len(parents)))
    slots = np.random.default_rng(seed).permutation([*nodes, *[masks.COMMITTED] * 6, *[masks.EMPTY] * 4])
    expected = np.zeros((len(nodes), len(slots)), bool)
    for i in nodes:
        path, up = {masks.COMMITTED}, i
        while up >= 0:
            path.add(up)
            up = parents[up]
        expected[i] = [slot in path for slot in slots]
    np.testing.assert_array_equal(seen(masks.tree(parents, jnp.asarray(slots[None])))[0], expected)


def test_tree_of_every_row():
    """Traced parents, others in every row, are data too."""
    parents, slots = jnp.array([[-1, 0, 1], [-1, 0, 0]]), jnp.array([[-1, 0, 1, 2]] * 2)
    got = seen(jax.jit(masks.tree)(parents, slots))
    np.testing.assert_array_equal(got[0], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(got[1], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: masks.window(SEGMENT, 0), "width of a mask"),
        (lambda: masks.strided(SEGMENT, 2, 0), "stride of a mask"),
        (lambda: masks.fixed(SEGMENT, 4, 5), "a summary of 5 tokens is longer than a block of 4"),
        (lambda: masks.sinks_and_window(SEGMENT, 0, 4), "sinks of a mask"),
        (lambda: masks.bigbird(SEGMENT, jax.random.key(0), block=4, random=-1), "random of a mask"),
        (lambda: masks.shifted(SEGMENT, 1), "at least 2, not 1"),
        (lambda: masks.tree([-1] * 91, SEGMENT), "a tree of 91 nodes: 1 to 90"),
        (lambda: masks.tree([], SEGMENT), "a tree of 0 nodes"),
        (lambda: masks.tree([-1, 1], SEGMENT), r"a node before it, or -1: \[-1, 1\]"),
    ],
)
def test_sizes_that_make_no_sense_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# What the blocks of a mask cost: block size 8, documents, windows and groups of multiples of it.
BLOCK, LONG = 8, 96
ALIGNED = jnp.asarray(np.repeat([0, 1, PAD], [48, 32, 16])[None])


def chain(segment):
    """Eight drafts in the last slots, each the child of the one before it; the first document is the text."""
    slot = jnp.arange(segment.shape[1]) - (segment.shape[1] - 8)
    text = jnp.where(segment == 0, masks.COMMITTED, masks.EMPTY)
    return masks.tree(np.arange(8) - 1, jnp.where(slot >= 0, slot, text))


COSTS = {
    "causal": lambda s: masks.causal(1, s.shape[1]),
    "packed": masks.packed,
    "bidirectional": masks.bidirectional,
    "prefix": lambda s: masks.prefix(jnp.array([24]), s.shape[1]),
    "infilling": lambda s: masks.infilling(s, jnp.arange(s.shape[1])[None] % 48 < 24),
    "choices": masks.choices,
    "window": lambda s: masks.window(s, 17),
    "within": lambda s: masks.within(with_positions(masks.packed(s)), 17),
    "strided": lambda s: masks.strided(s, 17, 16),
    "fixed": lambda s: masks.fixed(s, 16, 8),
    "sinks_and_window": lambda s: masks.sinks_and_window(s, 8, 17),
    "bigbird": lambda s: masks.bigbird(s, jax.random.key(1), block=8, random=2),
    "shifted": lambda s: masks.shifted(s, 16)[1],
    "tree": chain,
}


def map_of(mask, block=BLOCK):
    query, key = mask.read()
    length, width = (next(iter(s.values())).shape[1] for s in (query, key))
    high = min(block, length)
    return block_map(mask.rule, query, key, high, block, (1, length // high, width // block))


@pytest.mark.parametrize("name", COSTS)
def test_only_blocks_in_which_somebody_attends_are_active(name):
    """Exactly those that the whole mask has, where its parts end with blocks; and exactly the full ones are full."""
    mask = COSTS[name](ALIGNED)
    exact = seen(mask)[0]
    blocks = exact.reshape(len(exact) // BLOCK, BLOCK, LONG // BLOCK, BLOCK)
    some, every = (np.asarray(x)[0] for x in map_of(mask))
    assert 0 < some.sum() == blocks.any(axis=(1, 3)).sum()
    np.testing.assert_array_equal(some, blocks.any(axis=(1, 3)))
    np.testing.assert_array_equal(every, blocks.all(axis=(1, 3)))


LENGTHS = (29, 14, 21, 22)
HALVES = jnp.asarray(np.concatenate([*(np.arange(n) < n // 2 for n in LENGTHS), np.zeros(10, bool)])[None])


@pytest.mark.parametrize("name", ["packed", "window", "within", "infilling", "sinks_and_window"])
def test_documents_may_end_anywhere(name):
    """Neither a block of two documents nor one of a document and padding is active where nobody attends."""
    segment = jnp.asarray(np.repeat([0, 1, 2, 3, PAD], [*LENGTHS, 10])[None])
    mask = masks.infilling(segment, HALVES) if name == "infilling" else COSTS[name](segment)
    exact = seen(mask)[0].reshape(LONG // BLOCK, BLOCK, LONG // BLOCK, BLOCK)
    np.testing.assert_array_equal(np.asarray(map_of(mask)[0])[0], exact.any(axis=(1, 3)))


@pytest.mark.parametrize("name", sorted(set(COSTS) - {"causal", "prefix"}))
def test_other_data_do_not_compile_again(name):
    traces = []

    @jax.jit
    def both(segment):
        traces.append(name)
        mask = COSTS[name](segment)
        return map_of(mask), mask

    @jax.jit
    def of_mask(mask):
        traces.append(name)
        return mask.dense()

    for seed in range(3):
        segment = jnp.asarray(np.sort(np.random.default_rng(seed).integers(-1, 3, (1, LONG))))
        (some, _), mask = both(segment)
        exact = np.asarray(of_mask(mask))[0]
        active = exact.reshape(len(exact) // BLOCK, BLOCK, -1, BLOCK).any(axis=(1, 3))
        assert not (active & ~np.asarray(some)[0]).any()
    assert len(traces) == 2


def sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (math.prod(x.aval.shape) for x in equation.outvars)
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from sizes(inner.jaxpr)


@pytest.mark.parametrize("name", sorted(COSTS))
def test_nothing_is_as_large_as_the_pairs(name):
    """Streams, and the map of blocks: nowhere an array of more than a few numbers a token."""
    segment = jnp.zeros((1, 4096), int)
    jaxpr = jax.make_jaxpr(lambda s: map_of(COSTS[name](s), 512))(segment).jaxpr
    assert 4096 <= max(sizes(jaxpr)) <= 4 * 4096
