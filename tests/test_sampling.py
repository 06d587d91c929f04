"""Logit transforms against transformers' formulas in float64, and the drawn distribution against its closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from garrulax.sampling import transforms
from garrulax.sampling.transforms import DEFAULT, Transform, chain
from garrulax.sampling.transforms.thresholds import least_by_digits


def reference(logits, temperature, top_k, top_p):
    """transformers' warpers, restated: TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper; one row."""
    x = np.array(logits, np.float64)
    if temperature == 0:
        return np.where(np.arange(x.size) == x.argmax(), 0, -np.inf)
    x = x / temperature
    if top_k:
        x = np.where(x < np.sort(x)[-min(top_k, x.size)], -np.inf, x)
    if top_p < 1:
        order = np.argsort(x, kind="stable")
        removed = np.cumsum(softmax(x)[order]) <= 1 - top_p
        removed[-1] = False
        x[order[removed]] = -np.inf
    return x


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def shaped(logits, **knobs):
    rows = logits.shape[0]
    defaults = {"temperature": np.ones(rows), "top_k": np.zeros(rows), "top_p": np.ones(rows)}
    arrays = {k: jnp.asarray(np.broadcast_to(knobs.get(k, v), rows)) for k, v in defaults.items()}
    arrays = {k: v.astype(jnp.int32 if k == "top_k" else jnp.float32) for k, v in arrays.items()}
    return np.asarray(jax.jit(DEFAULT.update)(jnp.asarray(logits, jnp.float32), DEFAULT.init(arrays))[0])


def test_every_row_has_its_own_knobs_and_equals_transformers():
    rng = np.random.default_rng(0)
    knobs = [(t, k, p) for t in (0, 0.3, 1, 2.5) for k in (0, 1, 5, 40, 999) for p in (1, 0.99, 0.7, 0.2, 1e-3)]
    logits = rng.normal(size=(len(knobs), 61)) * 3
    t, k, p = map(np.array, zip(*knobs, strict=True))
    ours = shaped(logits, temperature=t, top_k=k, top_p=p)
    for row, (knob, x) in enumerate(zip(knobs, logits, strict=True)):
        wanted = reference(x.astype(np.float32), *knob)
        np.testing.assert_array_equal(np.isinf(ours[row]), np.isinf(wanted), err_msg=str(knob))
        kept = ~np.isinf(wanted)
        np.testing.assert_allclose(softmax(ours[row])[kept], softmax(wanted)[kept], atol=2e-6)


def test_ties():
    x = np.array([[1.0, 3, 3, 2, 2, 0]])
    np.testing.assert_array_equal(np.isfinite(shaped(x, temperature=0))[0], [0, 1, 0, 0, 0, 0])  # the first
    np.testing.assert_array_equal(np.isfinite(shaped(x, top_k=3))[0], [0, 1, 1, 1, 1, 0])  # all that tie with the k-th
    top = softmax(x[0])[1:3].sum()
    np.testing.assert_array_equal(np.isfinite(shaped(x, top_p=top / 2 + 1e-3))[0], [0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(np.isfinite(shaped(x, top_p=top / 4))[0], [0, 0, 1, 0, 0, 0])  # the last
    np.testing.assert_array_equal(np.isfinite(shaped(x, top_p=top + 1e-3))[0], [0, 1, 1, 0, 1, 0])


def test_top_mask_is_exact_on_all_kinds_of_floats():
    values = np.array(
        [0.0, -0.0, 2e-38, -2e-38, 3e38, -3e38, np.inf, -np.inf, 1, np.nextafter(1, 2), -7, -7], np.float32
    )
    weights = np.arange(1, values.size + 1, dtype=np.float32)
    above = np.array([weights[values > v].sum() for v in values])
    limits = np.arange(int(weights.sum()) + 2, dtype=np.float32)
    rows = [np.broadcast_to(x, (limits.size, x.size)) for x in (values, weights)]
    np.testing.assert_array_equal(transforms.top_mask(*map(jnp.asarray, rows), limits), above < limits[:, None])


@pytest.mark.parametrize("bits", [15, 31, 32])
def test_a_search_by_digits_finds_every_number(bits):
    """Of the first and the last number, and some between, with a property that all greater ones have."""
    r = np.random.default_rng(bits)
    answers = np.append(r.integers(0, 1 << bits, 40), [0, 1, (1 << bits) - 1]).astype(np.uint32)
    found = jax.jit(lambda x: least_by_digits(lambda n, least: n >= least, [x], bits))(answers)
    np.testing.assert_array_equal(found, answers)


def test_extreme_temperatures_do_not_overflow():
    x = np.array([[1e30, 3e30, -2e30, -np.inf], [1, 2, 3, 4]])
    assert not np.isnan(shaped(x, temperature=[1e-30, 1e-30])).any()
    np.testing.assert_array_equal(shaped(x, temperature=1e-30).argmax(-1), [1, 3])


def test_the_order_of_a_chain_is_its_semantics():
    x, knobs = jnp.array([[2, 1.5, 1, 0.5, 0, -1]]), {"temperature": jnp.array([2.0]), "top_p": jnp.array([0.8])}
    kept = []
    for parts in ([transforms.temperature(), transforms.top_p()], [transforms.top_p(), transforms.temperature()]):
        both = chain(*parts)
        kept.append(int(jnp.isfinite(both.update(x, both.init(knobs))[0]).sum()))
    assert kept == [4, 3]  # by hand: cumulative .306 .545 .731 .875 and .414 .666 .818


def test_a_transform_of_ones_own_can_carry_state():
    def update(logits, seen):
        token = jnp.argmax(jnp.where(seen, -jnp.inf, logits), axis=-1)
        return jnp.where(seen, -jnp.inf, logits), seen | (jnp.arange(logits.shape[-1]) == token[:, None])

    once = chain(Transform(lambda knobs: jnp.zeros((1, 4), bool), update), transforms.temperature())
    state, order = once.init({"temperature": jnp.zeros(1)}), []
    for _ in range(4):
        logits, state = once.update(jnp.array([[1.0, 4, 2, 3]]), state)
        order.append(int(logits.argmax()))
    assert order == [1, 3, 2, 0]


# -- The drawn distribution -------------------------------------------------------------------------------------------

DRAWS = 40_000


def p_value(tokens, target):
    """Of a chi-square test that tokens were drawn from target; rare ones are pooled to expectations of about 5."""
    counts, expected = np.bincount(tokens, minlength=target.size), target * tokens.size
    assert counts[target == 0].sum() == 0, "a token that must not be drawn was"
    order = np.argsort(expected)
    order = order[expected[order] > 0]
    group = np.where(expected[order] < 5, np.cumsum(expected[order]) // 5, tokens.size + np.arange(order.size))
    group = np.unique(group, return_inverse=True)[1]
    observed, wanted = (np.bincount(group, x[order]) for x in (counts, expected))
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@jax.jit
def many(logits, temperature, top_k, top_p, seeds, positions):
    rows = len(seeds)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    state = DEFAULT.init({k: jnp.broadcast_to(v, rows) for k, v in knobs.items()})
    return transforms.sample(DEFAULT.update(jnp.broadcast_to(logits, (rows, logits.size)), state)[0], seeds, positions)


def sample(logits, knobs, over, count=DRAWS, start=0):
    index = np.arange(start, start + count)
    seeds, positions = (index, np.full(count, 7)) if over == "seeds" else (np.full(count, 3), index)
    t, k, p = knobs
    args = jnp.float32(logits), jnp.float32(t), jnp.int32(k), jnp.float32(p)
    blocks = np.split(np.stack([seeds, positions]), 8 if len(logits) <= 1000 else 100, axis=1)
    return np.concatenate([many(*args, jnp.uint32(s), jnp.int32(at)) for s, at in blocks])


@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize("knobs", [(1, 0, 1), (0.5, 0, 1), (2, 0, 1), (1, 5, 1), (1, 0, 0.8), (0.7, 9, 0.9)], ids=str)
def test_draws_follow_the_shaped_distribution(knobs, over):
    logits = np.random.default_rng(1).normal(size=16).astype(np.float32) * 1.5
    tokens = sample(logits, knobs, over)
    assert p_value(tokens, softmax(reference(logits, *knobs))) > 1e-4


@pytest.mark.parametrize("knobs", [(1.1, 0, 1), (0.9, 0, 1)], ids=str)
def test_the_chi_square_test_sees_ten_percent_of_temperature(knobs):
    logits = np.random.default_rng(1).normal(size=16).astype(np.float32) * 1.5
    assert p_value(sample(logits, knobs, "seeds"), softmax(reference(logits, 1, 0, 1))) < 1e-6


def excess(tokens, target):
    """Total variation between tokens and target, in standard deviations from that of numpy's exact draws."""
    rng = np.random.default_rng(0)

    def distance(counts):
        return np.abs(counts / tokens.size - target).sum() / 2

    exact = [distance(x) for x in rng.multinomial(tokens.size, target, 60)]
    return (distance(np.bincount(tokens, minlength=target.size)) - np.mean(exact)) / np.std(exact)


def dependence(first, second, target):
    """p-value of a chi-square test that two draws are independent; tokens are pooled into at most 8 groups."""
    group = np.minimum(8 * (np.cumsum(target) - target / 2), 7).astype(int)
    group = np.unique(group, return_inverse=True)[1]
    pairs = np.bincount(group[first] * 8 + group[second], minlength=64).reshape(8, 8)
    return stats.chi2_contingency(pairs[: group.max() + 1, : group.max() + 1]).pvalue


SIZES = {4: 40_000, 16: 40_000, 1000: 24_000, 50257: 16_000}  # V -> draws
QUICK = [(1000, "float32", "seeds"), (16, "bfloat16", "positions")]


@pytest.mark.parametrize(
    ("size", "dtype", "over"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(SIZES, ("float32", "bfloat16"), ("seeds", "positions"))
    ],
)
def test_chi_square_and_total_variation(size, dtype, over):
    """And independence: of consecutive positions of a seed, and of consecutive seeds at a position."""
    logits = jnp.asarray(np.random.default_rng(2).normal(size=size) * 2, dtype)
    target = softmax(np.asarray(logits, np.float64))
    tokens = sample(logits, (1, 0, 1), over, SIZES[size])
    assert p_value(tokens, target) > 1e-4
    assert abs(excess(tokens, target)) < 5
    assert dependence(tokens[:-1], tokens[1:], target) > 1e-4


def test_total_variation_sees_ten_percent_of_temperature():
    logits = np.random.default_rng(1).normal(size=16).astype(np.float32) * 1.5
    target = softmax(reference(logits, 1, 0, 1))
    assert excess(np.random.default_rng(0).choice(16, DRAWS, p=softmax(logits / 1.1)), target) > 10


def test_four_equal_tokens_and_independence_of_neighbours():
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    tokens = sample(logits, (1, 0, 1), "positions")
    pairs = np.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16).reshape(4, 4)
    assert stats.chi2_contingency(pairs).pvalue > 1e-4
    seeds = sample(logits, (1, 0, 1), "seeds")
    pairs = np.bincount(seeds * 4 + tokens, minlength=16).reshape(4, 4)
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


@pytest.mark.slow
def test_rare_tokens_are_drawn():
    """400,000 tokens of 3e-8 each: noise of 23 random bits lets them win an eighth as often as they should."""
    rare = 400_000
    logits = jnp.log(jnp.array([1 - rare * 3e-8, *[3e-8] * rare]))[None]
    one = jax.jit(lambda seed: transforms.sample(logits, seed[None], jnp.zeros(1, jnp.int32))[0])
    wins = sum(int(one(jnp.uint32(seed)) > 0) for seed in range(3000))
    assert stats.binomtest(wins, 3000, rare * 3e-8).pvalue > 1e-4


def test_a_draw_depends_on_its_seed_and_position_alone():
    logits = jax.random.normal(jax.random.key(0), (6, 50))
    seed, position = jnp.arange(6, dtype=jnp.uint32) % 3, jnp.arange(6) // 2
    together = transforms.sample(logits, seed, position)
    for i in range(6):
        assert transforms.sample(logits[i : i + 1], seed[i : i + 1], position[i : i + 1])[0] == together[i]
    np.testing.assert_array_equal(transforms.sample(logits[::-1], seed[::-1], position[::-1]), together[::-1])
