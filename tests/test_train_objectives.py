import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import garrulax as gx
from garrulax import models
from garrulax.core.sharding import make_mesh
from garrulax.train import objectives

pytestmark = pytest.mark.usefixtures("quick_compilation")
causal_lm = jax.jit(objectives.causal_lm, static_argnums=2)
blank_infilling = jax.jit(objectives.blank_infilling, static_argnums=2)
CONFIG = models.gpt.Config(vocab=50, context=16, width=16, layers=2, heads=2)


@functools.cache
def init(config):
    return gx.init(config, jax.random.key(0))


def batch(rng, rows=3, length=12, vocab=50):
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.6).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def dense_nll(logits, targets):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, np.asarray(targets)[..., None], -1)[..., 0]


def test_loss_is_the_mean_over_weighted_tokens():
    b, params = batch(np.random.default_rng(0)), init(CONFIG)
    loss, metrics = causal_lm(params, b, CONFIG)
    nll = dense_nll(jax.jit(gx.forward, static_argnums=2)(params, b["tokens"], CONFIG)[0], b["targets"])
    assert metrics["tokens"] == b["weights"].sum() < b["weights"].size
    np.testing.assert_allclose(loss, (nll * b["weights"]).sum() / b["weights"].sum(), rtol=1e-6)


def test_large_logits_stay_finite_and_bfloat16_is_summed_in_float32():
    logits = jnp.array([[1e4, -1e4, 0.0], [0.5, 0.25, 3.0]])
    targets = jnp.array([1, 2])
    nll = objectives.negative_log_likelihood(logits, targets)
    np.testing.assert_allclose(nll, dense_nll(logits, targets), rtol=1e-6)
    many = jax.random.normal(jax.random.key(0), (4, 3000)).astype(jnp.bfloat16)
    nll = objectives.negative_log_likelihood(many, jnp.arange(4))
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, dense_nll(many.astype(jnp.float32), jnp.arange(4)), rtol=1e-5)


def test_vocabulary_sharded_over_the_mesh():
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(size=(4, 6, 32)).astype(np.float32), rng.integers(0, 32, (4, 6)).astype(np.int32)

    def total(logits, targets):
        return objectives.negative_log_likelihood(logits, targets).sum()

    expected, gradient = jax.value_and_grad(total)(logits, targets)
    with jax.set_mesh(make_mesh("fsdp=2,tensor=4")):
        placed = jax.device_put(logits, jax.P("fsdp", None, "tensor")), jax.device_put(targets, jax.P("fsdp", None))
        value, got = jax.jit(jax.value_and_grad(total))(*placed)
        assert jax.typeof(got).sharding.spec == jax.P("fsdp", None, "tensor")
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-7)


def test_packed_documents_do_not_see_one_another():
    params = init(CONFIG)
    b = batch(np.random.default_rng(2), rows=1)
    first = {k: v[:, :5] for k, v in b.items()}
    place = jnp.arange(12, dtype=jnp.int32)[None]
    second = {k: v[:, 5:] for k, v in b.items()} | {"positions": place[:, 5:]}
    packed = b | {"segment": (place >= 5).astype(jnp.int32)}
    parts = [causal_lm(params, x, CONFIG) for x in (first, second)]
    expected = sum(loss * m["tokens"] for loss, m in parts) / sum(m["tokens"] for _, m in parts)
    np.testing.assert_allclose(causal_lm(params, packed, CONFIG)[0], expected, rtol=1e-6)
    assert abs(causal_lm(params, b, CONFIG)[0] - expected) > 1e-5


def test_blank_infilling_needs_positions_and_ranks():
    config = models.glm.Config(vocab=50, context=16, width=16, layers=2, heads=2)
    params = gx.init(config, jax.random.key(0))
    b = batch(np.random.default_rng(0), rows=2, length=8)
    with pytest.raises(ValueError, match="lacks positions and rank"):
        blank_infilling(params, b, config)
    index = np.arange(8, dtype=np.int32)
    positions = np.broadcast_to(np.stack([index, index * 0]), (2, 2, 8))
    # With ranks 0 0 0 0 5 6 7 8 the first four see one another: the last of them changes what the first predicts.
    b |= {"positions": positions, "rank": np.broadcast_to(np.where(index < 4, 0, index + 1), (2, 8)).astype(np.int32)}
    only_first = b | {"weights": np.eye(1, 8, dtype=np.float32).repeat(2, 0)}
    changed = only_first | {"tokens": np.where(index == 3, (b["tokens"] + 1) % 50, b["tokens"])}
    later = only_first | {"tokens": np.where(index == 4, (b["tokens"] + 1) % 50, b["tokens"])}
    a, c, d = (blank_infilling(params, x, config)[0] for x in (only_first, changed, later))
    assert a != c
    assert a == d


def test_dropout_follows_the_key_and_the_config():
    params, b = init(CONFIG), batch(np.random.default_rng(0))
    plain = causal_lm(params, b, CONFIG)[0]
    one, two = (causal_lm(params, b, CONFIG, jax.random.key(i))[0] for i in (1, 2))
    assert len({float(plain), float(one), float(two)}) == 3
    off = dataclasses.replace(CONFIG, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    assert causal_lm(params, b, off, jax.random.key(1))[0] == plain


def test_objective_of_a_family():
    assert objectives.objective_name(None, CONFIG) == "causal"
    assert objectives.objective_name(None, models.glm.Config()) == "infill"
    assert objectives.objective_name("causal", models.glm.Config()) == "causal"
