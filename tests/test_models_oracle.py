"""Every decoder family against logits of the reference code: full pass (optimised programs), cached steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from oracle import LIKE_OTHERS, LLAMA, arrays, config, params, relative_error
from registry import CAUSAL, FAMILIES

import garrulax as gx
from garrulax.kernels import masks
from garrulax.layers.rope import Rope

CONTRACT = 2e-6  # ten times tighter than promised: independent implementations agree to 1e-6
forward = jax.jit(gx.forward, static_argnums=2)


@functools.cache
def unstacked(case):
    return gx.unstack(params(case))


UNSTACKED = [case for entry in FAMILIES.values() for case in entry.unstacked]
FORMS = [*((case, params) for case in CAUSAL), *((case, unstacked) for case in UNSTACKED)]


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_full_pass(case, form, table):
    z = arrays(case)
    logits, cache = forward(form(case), jnp.asarray(z["input_ids"]), config(case))
    assert cache is None
    error = relative_error(logits, z["logits"])
    table(CAUSAL[case], "full", error)
    assert error <= CONTRACT


#: In one form each, unstacked where a family has a case for that; test_models_padding goes on in stacked caches.
CACHED = [f for f in FORMS if f[0] not in LIKE_OTHERS and (f[1] is params) != (f[0] in UNSTACKED)]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("case", "form"), [f if f in CACHED else pytest.param(*f, marks=pytest.mark.slow) for f in FORMS]
)
def test_prefill_and_cached_steps(case, form, table):
    """Five tokens at once, then one at a time, in a cache with slots to spare."""
    z = arrays(case)
    tokens = jnp.asarray(z["input_ids"])
    length = tokens.shape[1]
    cache = gx.cache_for(form(case), config(case), len(tokens), length + 5)
    cache = cache.replace(planned=jnp.full_like(cache.planned, length))
    parts = [tokens[:, :5], *(tokens[:, i : i + 1] for i in range(5, length))]
    done = []
    for part in parts:
        logits, cache = forward(form(case), part, config(case), cache=cache)
        done.append(logits)
    assert int(cache.used[0]) == length
    error = relative_error(jnp.concatenate(done, axis=1), z["logits"])
    table(CAUSAL[case], "cached", error)
    assert error <= CONTRACT


def test_longrope_takes_the_short_factors_of_short_texts():
    """Eight tokens are the original context; each row of a batch by its own length."""
    z, c = arrays("llama_longrope"), config("llama_longrope")
    tokens = jnp.asarray(z["input_ids"])
    logits, _ = forward(params("llama_longrope"), tokens[:, :8], c)
    assert relative_error(logits, z["short_logits"]) <= CONTRACT
    short = jnp.where(jnp.arange(12) < 8, tokens, 0)
    valid = jnp.stack([jnp.ones(12, int), (jnp.arange(12) < 8).astype(int)])
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    both = jnp.stack([tokens[0], short[1]])
    logits, _ = forward(params("llama_longrope"), both, c, mask=masks.padded(valid), positions=positions)
    assert relative_error(logits[0], z["logits"][0]) <= CONTRACT
    assert relative_error(logits[1, :8], z["short_logits"][1]) <= CONTRACT


@pytest.mark.parametrize("case", [case for case in LLAMA if config(case).rope != Rope()])
def test_the_bound_separates_the_rope_scalings(case):
    c = config(case)
    plain = dataclasses.replace(c, rope=Rope(theta=c.rope.theta))
    logits, _ = forward(params(case), jnp.asarray(arrays(case)["input_ids"]), plain)
    assert relative_error(logits, arrays(case)["logits"]) > 1000 * CONTRACT
