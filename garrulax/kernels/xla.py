"""Attention that XLA compiles, on any platform: chunks of queries against chunks of keys, memory O(T)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels import dense, dropout
from garrulax.kernels.call import Gradients, Operands, Options
from garrulax.kernels.passes import TwoPasses


@dataclasses.dataclass(frozen=True)
class Chunked(TwoPasses):
    """For any platform and request.

    block_q, block_k: tokens of a chunk of queries and of keys.
    """

    block_q: int = 512
    block_k: int = 512
    partitioned = True

    def refusal(self, options: Options, operands: Operands) -> str | None:
        """It computes everything."""
        return None

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """As `TwoPasses.forward`."""
        o = operands
        x, _, seen = _scores(options, o)
        x = jnp.where(seen, x, -jnp.inf)
        lse = jax.nn.logsumexp(x, axis=-1)
        p = jnp.where(seen, jnp.exp(x - jnp.where(jnp.isneginf(lse), 0, lse)[..., None]), 0)
        if o.seeds is not None:
            p = jnp.where(_kept(options, o), p / (1 - options.dropout), 0)
        out = jnp.einsum("BKGTS,BSKC->BTKGC", _grouped(p, o), o.value, preferred_element_type=x.dtype)
        return out.reshape(*o.query.shape[:3], -1).astype(o.query.dtype), lse

    def backward(
        self, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """As `TwoPasses.backward`."""
        o = operands
        B, T, H, C = o.query.shape
        K = o.key.shape[2]
        x, slope, seen = _scores(options, o)
        p = jnp.where(seen, jnp.exp(x - lse[..., None]), 0)
        c = cotangent.reshape(B, T, K, H // K, -1)
        dp = jnp.einsum("BTKGC,BSKC->BKGTS", c, o.value, preferred_element_type=x.dtype).reshape(p.shape)
        dropped = p
        if o.seeds is not None:
            kept = _kept(options, o)
            dropped, dp = (jnp.where(kept, y / (1 - options.dropout), 0) for y in (p, dp))
        dv = jnp.einsum("BKGTS,BTKGC->BSKC", _grouped(dropped, o), c)
        ds = p * (dp - delta[..., None])
        dbias = None if o.bias is None else _reduced(ds, o.bias)
        dsteps = None
        if o.steps is not None:
            distance = o.key_streams["position"][:, None, :] - o.query_streams["position"][:, :, None]
            step = jnp.searchsorted(jnp.array(options.starts, jnp.int32), distance, side="right")
            dsteps = jnp.einsum("BHTS,BTSN->NH", ds, jax.nn.one_hot(step, o.steps.shape[0])).astype(o.steps.dtype)
        ds = _grouped(ds * slope * options.scale, o)
        q = o.query.reshape(B, T, K, H // K, C)
        dq = jnp.einsum("BKGTS,BSKC->BTKGC", ds, o.key).reshape(o.query.shape)
        dk = jnp.einsum("BKGTS,BTKGC->BSKC", ds, q)
        return Gradients(dq.astype(o.query.dtype), dk.astype(o.key.dtype), dv.astype(o.value.dtype), dbias, dsteps)


def _scores(options: Options, o: Operands) -> tuple[jax.Array, Any, jax.Array]:
    B, T, H, C = o.query.shape
    S, K = o.key.shape[1:3]
    dtype = jnp.promote_types(o.query.dtype, jnp.float32)
    q = o.query.reshape(B, T, K, H // K, C)
    raw = jnp.einsum("BTKGC,BSKC->BKGTS", q, o.key, preferred_element_type=dtype).reshape(B, H, T, S) * options.scale
    slope = 1 if options.softcap is None else 1 - jnp.tanh(raw / options.softcap) ** 2
    seen = options.rule.evaluate(
        {name: s[:, :, None] for name, s in o.query_streams.items()},
        {name: s[:, None, :] for name, s in o.key_streams.items()},
    )
    return dense.scores(raw, options, o), slope, jnp.broadcast_to(seen, (B, T, S))[:, None]


def _kept(options, o):
    index = (jnp.arange(n, dtype=jnp.int32) for n in (o.query.shape[1], o.key.shape[1]))
    rows, columns = index
    return dropout.kept(o.seeds[:, :, None, None], rows[:, None], columns, options.dropout)


def _grouped(x, o):
    K = o.key.shape[2]
    return x.reshape(x.shape[0], K, -1, *x.shape[2:]).astype(o.query.dtype)


def _reduced(x, bias):
    axes = tuple(i for i in range(4) if bias.shape[i] == 1 != x.shape[i])
    return x.sum(axis=axes, keepdims=True).astype(bias.dtype)
