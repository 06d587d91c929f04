"""The loss in chunks of tokens against the formula with all logits, and that these never exist."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import equations

from garrulax.core.sharding import make_mesh
from garrulax.layers import mlp
from garrulax.layers.mlp import gelu_tanh
from garrulax.train import token_loss
from garrulax.train.regularizers import Regularizers

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, D, V = 3, 7, 8, 33
RNG = np.random.default_rng(0)
X, HEAD = RNG.normal(size=(B, T, D)), RNG.normal(size=(V, D))
TARGETS, WEIGHTS = RNG.integers(0, V, (B, T)).astype(np.int32), RNG.random((B, T)) * (RNG.random((B, T)) < 0.7)


def formula(x, head, weights, extra):
    """Optax's cross-entropy in float64, and z-loss."""
    logits = x @ head.T
    labels = optax.smooth_labels(jax.nn.one_hot(TARGETS, len(head), dtype=x.dtype), extra.label_smoothing)
    z = extra.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum((optax.safe_softmax_cross_entropy(logits, labels) + z) * weights)


@pytest.fixture
def padded(monkeypatch):
    """As on a GPU, with chunks of 4 tokens: 21 tokens make 7 of 3, and 33 ids are padded to 128."""
    gpu = types.SimpleNamespace(platform=lambda device: "gpu", target_device=lambda arrays: None)
    monkeypatch.setattr(token_loss, "picking", gpu)
    monkeypatch.setattr(token_loss, "LEAST_PADDED", 1)
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", 4 * token_loss.ALIGNED)


def test_value_and_gradients_are_those_of_the_formula(padded):
    extra = Regularizers(z_loss=0.03, label_smoothing=0.2)

    def loss(x, head, weights):
        return token_loss.weighted_loss(x, head, TARGETS, weights, extra)

    with jax.enable_x64(True):
        wanted = jax.jit(lambda *operands: jax.value_and_grad(formula, (0, 1, 2))(*operands, extra))
        expected, slopes = wanted(X, HEAD, WEIGHTS)
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        value, got = step(X, HEAD, WEIGHTS)
        np.testing.assert_allclose(value, expected, rtol=1e-13)
        np.testing.assert_allclose(jax.jit(loss)(X, HEAD, WEIGHTS), expected, rtol=1e-13)
        for a, b in zip(got, slopes, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        with jax.set_mesh(make_mesh("data=1", jax.devices()[:1])):
            on_mesh, slope = jax.jit(jax.value_and_grad(loss))(X, HEAD, WEIGHTS)
        np.testing.assert_allclose(on_mesh, expected, rtol=1e-13)
        np.testing.assert_allclose(slope, slopes[0], rtol=1e-10, atol=1e-12)
        shapes = {x.aval.shape for e in equations(step.trace(X, HEAD, WEIGHTS).jaxpr.jaxpr) for x in e.outvars}
    assert (3, 128) in shapes
    assert max(np.prod(s) for s in shapes if len(s) > 1 and s[-1] in (V, 128)) == 3 * 128  # never [B, T, V]


def test_a_frozen_head_gets_no_product_and_bfloat16_is_summed_in_float32(padded):
    x, head = jnp.asarray(X, jnp.bfloat16), jnp.asarray(HEAD, jnp.bfloat16)
    weights = jnp.asarray(WEIGHTS, jnp.float32)

    def loss(x, head):
        return token_loss.weighted_loss(x, head, TARGETS, weights, Regularizers())

    def products(argnums):
        program = jax.jit(jax.grad(loss, argnums)).trace(x, head).jaxpr.jaxpr
        return [e.outvars[0].aval.dtype for e in equations(program) if e.primitive.name == "dot_general"]

    assert products(0) == [jnp.bfloat16, jnp.float32]
    assert products((0, 1)) == [jnp.bfloat16, jnp.float32, jnp.float32]
    got = jax.jit(jax.grad(loss, (0, 1)))(x, head)
    wide = [a.astype(jnp.float32) for a in (x, head)]
    wanted = jax.jit(lambda *operands: jax.grad(formula, (0, 1))(*operands, weights, Regularizers()))
    for a, b in zip(got, wanted(*wide), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


def test_gelu_with_tanh_is_the_formula_and_keeps_one_array():
    with jax.enable_x64(True):
        x = jnp.linspace(-9.0, 9.0, 2001)
        both = [jax.jit(jax.vmap(jax.value_and_grad(f))) for f in (gelu_tanh, lambda x: jax.nn.gelu(x))]
        (value, slope), (expected, wanted) = (f(x) for f in both)
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        np.testing.assert_allclose(slope, wanted, rtol=1e-12, atol=1e-14)
        assert [a.shape for a in jax.tree.leaves(jax.vjp(gelu_tanh, x)[1])] == [x.shape]


def test_gelu_with_tanh_keeps_its_input_on_a_gpu(monkeypatch):
    x = jnp.linspace(-9.0, 9.0, 201)
    value, slope = jax.vmap(jax.value_and_grad(gelu_tanh))(x)
    gpu = types.SimpleNamespace(platform=lambda device: "gpu", target_device=lambda arrays: None)
    monkeypatch.setattr(mlp, "picking", gpu)
    got, back = jax.vjp(gelu_tanh, x)
    (kept,) = (a for a in jax.tree.leaves(back) if a.shape)
    assert (kept == x).all()
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(back(jnp.ones_like(x))[0], slope, rtol=1e-6, atol=1e-6)


def test_float16_takes_weights_of_any_size():
    key = jax.random.key(0)
    x, head = jax.random.normal(key, (1, 8, 16), jnp.float16), jax.random.normal(key, (40, 16), jnp.float16)
    targets = jnp.arange(8, dtype=jnp.int32)[None]

    def gradient(weight):
        weights = jnp.full((1, 8), weight)
        return jax.grad(lambda x: token_loss.weighted_loss(x, head, targets, weights, Regularizers()) / weights.sum())(
            x
        )

    for weight in (1e5, 1e-8):
        np.testing.assert_allclose(gradient(weight), gradient(1.0), rtol=2e-3)
