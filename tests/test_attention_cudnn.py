"""What cuDNN is given, and what it is not: it runs on NVIDIA GPUs only, so here stands what it refuses and why."""

import re

import jax
import jax.numpy as jnp
import jaxprs
import kernel_cases as cases
import numpy as np
import pytest

from garrulax.kernels import masks
from garrulax.kernels.attention import attention, request
from garrulax.kernels.cudnn import Cudnn
from garrulax.layers.call import mask_and_cache
from garrulax.layers.stack import REMAT

T = 8


def unsupported_reason(mask, *, length=T, keys=None, width=64, values=None, dtype=jnp.bfloat16, **extras):
    shapes = ((length, 4, width), (keys or length, 2, width), (keys or length, 2, values or width))
    operands = [jax.ShapeDtypeStruct((cases.B, *s), dtype) for s in shapes]

    def asked(*operands):
        names = ("bias", "alibi", "relative", "sinks", "scale", "softcap", "dropout_key")
        options, o = request(*operands, mask, **{**dict.fromkeys(names), "dropout": 0.0, **extras})
        reasons.append(Cudnn().unsupported_reason(options, o))

    reasons = []
    jax.eval_shape(asked, *operands)
    return reasons[0]


CAUSAL = masks.causal(cases.B, T)


def test_it_takes_causal_and_full_attention():
    assert unsupported_reason(CAUSAL) is None
    assert unsupported_reason(None) is None
    assert unsupported_reason(None, keys=12) is None
    assert unsupported_reason(None, bias=jnp.zeros((1, 4, T, T))) is None


@pytest.mark.parametrize(
    ("mask", "options", "reason"),
    [
        (cases.packed(T), {}, "no masks but causal"),
        (masks.prefix(jnp.array([3, 4]), T), {}, "no masks but causal"),
        (CAUSAL.replace(query={**CAUSAL.query, "position": CAUSAL.query["rank"]}), {"alibi": jnp.ones(4)}, "no ALiBi"),
        (CAUSAL, {"softcap": 1.0}, "no softcap"),
        (CAUSAL, {"sinks": jnp.ones(4)}, "no sinks"),
        (CAUSAL, {"dropout": 0.1, "dropout_key": jax.random.key(0)}, "drops other"),
        (CAUSAL, {"bias": jnp.zeros((1, 4, 1, T))}, r"not \(1, 4, 1, 8\)"),
        (masks.causal(cases.B, 7), {"bias": jnp.zeros((1, 4, 7, 7)), "length": 7}, "even lengths, not 7 and 7"),
        (CAUSAL, {"dtype": jnp.float32}, "not float32"),
        (CAUSAL, {"width": 256}, "up to 128, not 256"),
        (CAUSAL, {"width": 20}, "multiples of 8"),
        (CAUSAL, {"values": 32}, "as wide as the keys"),
    ],
)  # fmt: skip
def test_it_refuses_by_name(mask, options, reason):
    said = unsupported_reason(mask, **options)
    assert said is not None
    assert re.search(reason, said), said


def test_refusing_what_was_asked_for_by_name_says_why():
    x = jnp.zeros((cases.B, T, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="cuDNN has no masks but causal"):
        attention(x, x, x, mask=cases.packed(T), implementation=Cudnn())


def test_a_mask_that_says_it_is_causal_is():
    """And every way of narrowing it takes the word back."""
    tokens = jnp.zeros((cases.B, T), jnp.int32)
    expected = np.broadcast_to(np.tril(np.ones((T, T), bool)), (cases.B, T, T))
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (cases.B, T))
    prepared, _ = mask_and_cache(tokens, position, None, None)
    for mask in (CAUSAL, masks.causal_from(tokens), prepared):
        assert mask.causal
        np.testing.assert_array_equal(mask.dense(), expected)
    for mask in (masks.within(prepared, 3), masks.causal_from(tokens, 3), masks.causal_from(tokens, jnp.int32(0))):
        assert not mask.causal


@pytest.mark.parametrize(("remat", "forwards"), [("dots", 1), ("full", 2)])
def test_its_forward_pass_is_not_computed_again_where_products_are_saved(remat, forwards, monkeypatch):
    """The policy knows it by the name of JAX's primitive, which may change."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    x = jax.ShapeDtypeStruct((2, T, 4, 64), jnp.bfloat16)

    def loss(x):
        layer = jax.checkpoint(lambda x: attention(x, x, x, implementation="cudnn"), policy=REMAT[remat])
        return layer(x).astype(jnp.float32).sum()

    found = [eqn.primitive.name for eqn in jaxprs.equations(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)]
    assert found.count("dot_product_attention_fwd_wrapper") == forwards
