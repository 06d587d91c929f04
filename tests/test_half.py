"""bfloat16 on a CPU: what it is loaded as, products in blocks, and the memory that decoding takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

import garrulax as gx
from garrulax.core import half
from garrulax.core.einsum import einsum, lookup
from garrulax.hub import memory
from garrulax.sampling import knobs, requests, state
from garrulax.sampling.loop import decode_steps
from garrulax.sampling.transforms import DEFAULT

CONFIG = gx.preset("llama-tiny", layers=2, width=256, heads=4, kv_heads=4, mlp_width=512, vocab=1031, eos=None)


def bfloat16(*shape):
    return jnp.asarray(np.random.default_rng(len(shape) + shape[0]).normal(size=shape), jnp.bfloat16)


@pytest.mark.parametrize(("pattern", "shape"), [("BTD,DF->BTF", (1031, 96)), ("BTD,FD->BTF", (97, 1031))])
def test_products_in_blocks_are_the_products(pattern, shape, monkeypatch):
    monkeypatch.setattr(half, "BLOCK", 1 << 14)  # 1031 rows are no multiple of a block
    x, w = bfloat16(1, 3, 1031), bfloat16(*shape)
    assert half.applies(x[0], w)
    expected = jnp.einsum(pattern, *(np.asarray(y, np.float32) for y in (x, w)))
    np.testing.assert_allclose(np.asarray(einsum(pattern, x, w), np.float32), expected, rtol=0.01, atol=0.02)

    def gradients(least):
        monkeypatch.setattr(half, "LEAST", least)
        return jax.grad(lambda *y: jnp.sum(einsum(pattern, *y).astype(jnp.float32)), (0, 1))(x, w)

    for ours, theirs in zip(gradients(0), gradients(1 << 40), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_of_a_table_and_their_gradient():
    table, ids = bfloat16(7, 4), jnp.array([[6, 0, 7, -1, 6]], jnp.int32)
    picked = lookup(table, ids)
    np.testing.assert_array_equal(picked[0, :2], table[jnp.array([6, 0])])
    assert jnp.isnan(picked[0, 2:4]).all()
    gradient = jax.grad(lambda t: jnp.sum(lookup(t, ids[:, [0, 1, 4]]).astype(jnp.float32)))(table)
    np.testing.assert_array_equal(gradient[:, 0], [1, 0, 0, 0, 0, 0, 2])


def test_texts_and_scores_are_those_of_the_weights_in_float32():
    """Every bfloat16 is a float32: only the order of sums differs."""
    config = gx.preset("llama-tiny", layers=1, width=64, heads=4, kv_heads=2, mlp_width=96, vocab=1031, eos=None)
    params = quick.init(config, jax.random.key(0), dtype="bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    with quick.compilation():
        ours, theirs = (gx.generate((p, config), [1, 2, 3], max_new_tokens=6, temperature=0.0) for p in (params, wide))
    assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


@pytest.mark.slow
def test_decoding_holds_no_float32_copy_of_the_weights():
    params = quick.init(CONFIG, jax.random.key(0), dtype="bfloat16")
    unstacked = requests.prepare_model((params, CONFIG))[0][1]
    stack, layer = params["blocks"]["mlp"]["up"], unstacked["blocks"][1]["mlp"]["up"]
    for view in jax.tree.leaves(layer):  # nothing was copied
        assert view.unsafe_buffer_pointer() == stack.unsafe_buffer_pointer() + stack.nbytes // 2
    values = knobs.knobs_per_prompt(1, max_new_tokens=4, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    batch = requests.assemble([requests.causal_prompt([1, 2], 4, CONFIG, "")], values, CONFIG)
    first = jax.eval_shape(
        lambda p: state.empty(p, state.prefill(p, batch, CONFIG, DEFAULT, 16), CONFIG, 2, 16), unstacked
    )
    program = decode_steps.lower(unstacked, first, np.int32(4), CONFIG, DEFAULT).compile()
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    # Some blocks of weights and the activations; the whole weights in float32 would be twice `weights`.
    assert program.memory_analysis().temp_size_in_bytes < 8 * 4 * half.BLOCK < weights


def test_a_cpu_loads_half_precision_as_float32_where_memory_allows(tmp_path, monkeypatch, caplog):
    config = gx.preset("llama-tiny", layers=1, width=32, heads=2, kv_heads=2, mlp_width=48, vocab=97)
    params = quick.init(config, jax.random.key(0), dtype="bfloat16")
    gx.save(gx.Model(config, params), tmp_path / "m")

    def loaded(**options):
        return gx.load(tmp_path / "m", **options).params["tokens"]

    assert loaded().dtype == jnp.float32
    assert "read as float32" in caplog.text
    np.testing.assert_array_equal(loaded(), params["tokens"])
    for dtype in ("stored", "bfloat16", jnp.bfloat16):
        assert loaded(dtype=dtype).dtype == jnp.bfloat16
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000)
    assert loaded().dtype == jnp.bfloat16
    assert "stay in 16 bits" in caplog.text
