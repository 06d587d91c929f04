"""The families under jit, grad and vmap; scanned, laid out and unstacked; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import FAMILIES

import garrulax as gx
from garrulax.kernels import masks

CONFIGS = {name: entry.with_all_parts for name, entry in FAMILIES.items()}


def families(*quick):
    """All families, of which `make test` runs some only."""
    params = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
    return pytest.mark.parametrize("family", params)


TOKENS = np.random.default_rng(0).integers(0, 40, (3, 10))


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def params(family):
    c = CONFIGS[family]
    tree = gx.init(c, jax.random.key(1))
    r = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + r.normal(0, 0.1, x.shape).astype(np.float32), tree)  # no bias stays zero


def loss(p, tokens, c, **options):
    logits, _ = gx.forward(p, tokens, c, **options)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0])


forward = jax.jit(gx.forward, static_argnums=2)
value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=2, static_argnames=("remat", "unroll"))


def assert_close(a, b, bound=2e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() <= bound * max(np.abs(np.asarray(y)).max(), 1)


@families("llama")
def test_gradient_equals_finite_differences(family):
    """In float64, along a random direction through every parameter at once."""
    c = CONFIGS[family]
    single = params(family)
    with jax.enable_x64(True):
        p = jax.tree.map(lambda x: x.astype(jnp.float64), single)
        keys = iter(jax.random.split(jax.random.key(5), 99))
        direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), p)
        step = 1e-6

        def moved(sign):
            return value_and_grad(jax.tree.map(lambda x, d: x + sign * step * d, p, direction), TOKENS, c)[0]

        slope = (moved(1) - moved(-1)) / (2 * step)
        _, gradient = value_and_grad(p, TOKENS, c)
        product = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        assert float(product) == pytest.approx(float(slope), rel=1e-7)
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


@families("llama")
def test_every_form_gives_the_same_loss_and_gradients(family):
    """Scanned, laid out, unstacked, recomputed; with dropout, since its keys must fall on the same layers."""
    c, key = CONFIGS[family], jax.random.key(7)
    expected = value_and_grad(params(family), TOKENS, c, key=key)
    if family == "gpt":  # one function runs the layers of all families
        for options in ({"remat": "full"}, {"remat": "dots", "unroll": True}):
            assert_close(value_and_grad(params(family), TOKENS, c, key=key, **options), expected)
    value, gradient = value_and_grad(gx.unstack(params(family)), TOKENS, c, key=key)
    assert_close((value, gradient["blocks"]), (expected[0], gx.unstack(expected[1])["blocks"]))
    if family == "glm":
        assert_close(loss(gx.unstack(params(family)), TOKENS, c, key=key), expected[0])  # and without jit


@families("glm")
def test_vmap_over_parameters_and_over_batches(family):
    c = CONFIGS[family]
    ensemble = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params(family))
    tokens = jnp.asarray(np.stack([TOKENS, TOKENS[::-1]]))
    got = jax.jit(jax.vmap(lambda p, t: gx.forward(p, t, c)[0]))(ensemble, tokens)
    for i in range(2):
        assert_close(got[i], forward(jax.tree.map(lambda x, i=i: x[i], ensemble), tokens[i], c)[0])
    gradients = jax.jit(jax.vmap(jax.grad(lambda p, t: loss(p, t[None], c)), (None, 0)))(params(family), TOKENS)
    _, expected = value_and_grad(params(family), TOKENS, c)
    assert_close(jax.tree.map(lambda g: g.mean(0), gradients), expected)  # per-example gradients


@families("llama")
def test_vmap_over_caches(family):
    """Each row of an outer batch with a cache of its own, filled to another length."""
    c, p = CONFIGS[family], params(family)

    @jax.jit
    def step(tokens, cache):
        return gx.forward(p, tokens, c, cache=cache)

    caches = [step(TOKENS[:1, :n], gx.cache_for(p, c, 1, 8))[1] for n in (3, 5)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    got, _ = jax.jit(jax.vmap(step))(jnp.asarray([TOKENS[:1, 3:4], TOKENS[:1, 5:6]]), stacked)
    for i, n in enumerate((3, 5)):
        assert_close(got[i], step(TOKENS[:1, n : n + 1], caches[i])[0])


@families("glm130b", "llama")
def test_bfloat16_parameters_give_bfloat16_logits_near_float32(family):
    c = CONFIGS[family]
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(family))
    logits, _ = forward(p, TOKENS, c)
    assert logits.dtype == jnp.bfloat16
    exact, _ = forward(jax.tree.map(lambda x: x.astype(jnp.float32), p), TOKENS, c)
    assert np.abs(np.asarray(logits, np.float32) - exact).max() <= 0.1 * np.abs(exact).max()


@families("gpt", "glm", "llama")
def test_a_token_outside_the_vocabulary_gives_nan_in_what_follows(family):
    tokens = jnp.asarray(TOKENS).at[0, 5].set(40)
    logits, _ = forward(params(family), tokens, CONFIGS[family])
    assert np.isnan(logits[0, 5:]).all()
    assert np.isfinite(logits[1:]).all()


@families("gpt", "glm")
def test_misuse_is_named(family):
    c, p = CONFIGS[family], params(family)
    with pytest.raises(ValueError, match=r"integers \[batch, length\], not float32 \(2, 3\)"):
        gx.forward(p, jnp.ones((2, 3), jnp.float32), c)
    with pytest.raises(ValueError, match=r"not int32 \(3,\)"):
        gx.forward(p, jnp.ones(3, jnp.int32), c)
    with pytest.raises(ValueError, match="unknown remat 'all': choose from none, dots, full"):
        gx.forward(p, TOKENS, c, remat="all")
    _, filled = gx.forward(p, TOKENS[:, :3], c, cache=gx.cache_for(p, c, 3, 4))
    with pytest.raises(ValueError, match="4 slots: 3 used, no room for 2 more"):
        gx.forward(p, TOKENS[:, :2], c, cache=filled)
    with pytest.raises(ValueError, match="both be stacked or both be unstacked"):
        gx.forward(p, TOKENS, c, cache=gx.cache_for(gx.unstack(p), c, 3, 16))
    own = masks.causal(3, 10).query
    with pytest.raises(ValueError, match="streams of the new tokens only"):
        gx.forward(p, TOKENS, c, cache=gx.cache_for(p, c, 3, 16), mask=masks.Mask(own, own))
    with pytest.raises(TypeError, match="dict is not the Config of a family"):
        gx.forward(p, TOKENS, {})
