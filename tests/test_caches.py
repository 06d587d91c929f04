"""Caches of windows, sinks, blocks and int8: against formulas in float64 over the keys that are kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept_reference
import numpy as np
import pytest
import tiny

import garrulax as gx
from garrulax import models
from garrulax.layers.cache_kinds import FULL, Blocks, Full, Sinks, Window

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZES = {"vocab": 61, "width": 16, "layers": 2, "heads": 4, "eos": None, "init_std": 0.4}
LLAMA = gx.preset("llama-tiny", **SIZES, kv_heads=2, mlp_width=24, context=64)
ALIBI = dataclasses.replace(LLAMA, positions="alibi", dialect="baichuan", kv_heads=4)
FALCON = gx.preset("falcon-7b", **SIZES, kv_heads=1, alibi=True, context=64)
TEXT = np.random.default_rng(0).integers(0, 61, 40).tolist()


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, tokens, cache, config):
    return gx.forward(params, tokens, config, cache=cache)


def logits(params, config, tokens, kind, passes, size=None):
    """Logits [T, V] of a text that is read in passes of some lengths, the last of which repeats."""
    cache, parts = models.cache_for(params, config, 1, size or len(tokens), kind=kind), []
    while tokens:
        count = min(passes[0], len(tokens))
        passes = passes[1:] or passes
        part, cache = _forward(params, jnp.array([tokens[:count]], jnp.int32), cache, config)
        tokens = tokens[count:]
        parts.append(part[0])
    return np.concatenate(parts)


def close(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


BLOCKS = Blocks(size=4, top=2, first=2, local=8, representatives=2, chunk=7)
KINDS = {
    "window": (Window(9, chunk=7), kept_reference.window(9), False),
    "sinks": (Sinks(3, 9, chunk=7), kept_reference.sinks(3, 9), True),
    "blocks": (BLOCKS, kept_reference.blocks(BLOCKS), True),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("config", [LLAMA, ALIBI, FALCON], ids=["llama", "alibi", "falcon"])
def test_what_is_kept_is_attended_to_as_in_a_dense_formula(name, config):
    kind, chosen, counted = KINDS[name]
    params = tiny.params(config)
    wanted = kept_reference.logits(params, config, TEXT, chosen, counted)
    close(logits(params, config, TEXT, kind, [5, 7]), wanted)
    close(logits(gx.unstack(params), config, TEXT, kind, [1]), wanted)
    full = logits(params, config, TEXT, FULL, [len(TEXT)])
    assert np.abs(full - wanted)[20:].max() > 0.01  # leaving tokens out matters
