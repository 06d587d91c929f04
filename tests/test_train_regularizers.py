"""Changes of the training loss: z-loss, label smoothing, and a smaller gradient of the embedding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from garrulax import models
from garrulax.core import spec
from garrulax.train.objectives import causal_lm
from garrulax.train.regularizers import Regularizers, shrunk

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = models.llama.Config(vocab=24, context=8, width=16, layers=1, heads=2, kv_heads=2, mlp_width=24, tied=True)
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": RNG.integers(0, 24, (2, 8)).astype(np.int32),
    "targets": RNG.integers(0, 24, (2, 8)).astype(np.int32),
    "weights": RNG.random((2, 8)).astype(np.float32),
}


def params(config=CONFIG):
    return jax.tree.map(
        lambda s: RNG.normal(size=s.shape, scale=0.3).astype(np.float32), spec.abstract(models.parameters(config))
    )


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.03, 0.0), (0.0, 0.1), (0.02, 0.3)])
def test_loss_is_the_formula(z_loss, smoothing):
    p = params()
    logits = np.float64(models.forward(p, BATCH["tokens"], CONFIG)[0])
    z = np.log(np.exp(logits).sum(-1))
    labels = np.float64(optax.smooth_labels(jnp.eye(24)[BATCH["targets"]], smoothing))
    each = -(labels * (logits - z[..., None])).sum(-1) + z_loss * z**2
    expected = (each * BATCH["weights"]).sum() / BATCH["weights"].sum()
    got, _ = causal_lm(p, BATCH, CONFIG, extra=Regularizers(z_loss, smoothing))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_only_the_gradient_through_the_lookup_shrinks():
    """With tied embeddings: those of the lookup and of the head are told apart by a model that has both."""
    p = params()
    untied = dataclasses.replace(CONFIG, tied=False)
    apart = jax.jit(jax.grad(lambda p: causal_lm(p, BATCH, untied)[0]))({**p, "head": p["tokens"]})
    extra = Regularizers(embedding_shrink=0.1)
    got = jax.jit(jax.grad(lambda p: causal_lm(p, BATCH, CONFIG, extra=extra)[0]))(p)
    np.testing.assert_allclose(got["tokens"], 0.1 * apart["tokens"] + apart["head"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(got["blocks"]["mlp"]["up"], apart["blocks"]["mlp"]["up"], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(shrunk(p, 0.1)["tokens"], p["tokens"])  # the loss stays the same, bit for bit
