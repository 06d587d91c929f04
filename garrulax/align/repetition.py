"""Losses against repetition: unlikelihood, ScaleGrad, DITTO and coverage.

Letters: B rows, T tokens, V vocabulary. `segment` int32 [B, T] numbers the documents of a packed row; None is one a
    row.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from garrulax.core.dtypes import at_least_float32
from garrulax.core.sharding import spec_of

_LEAST = 1e-5  # of 1 - p, as in the original code of token-level unlikelihood
_LEAST_SEQUENCE = 1e-20  # in that of the sequence level and of DITTO


def unlikelihood(
    logits: jax.Array, targets: jax.Array, mask: jax.Array | None = None, segment: jax.Array | None = None
) -> jax.Array:
    """The penalty of token-level unlikelihood (Welleck et al. 2020, eq. 4), to be added to the cross entropy.

    At each target it is the sum of -log(1 - p(c)) over the distinct earlier targets c of the document other than the
    target itself, with 1 - p(c) at least 1e-5.

    Args:
        logits: [B, T, V].
        targets: int32 [B, T].
        mask: 1 at targets that count, [B, T]: others have no penalty and are not candidates. None is all.
        segment: Documents of packed rows, int32 [B, T].

    Returns:
        Nats of each target, [B, T].
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    counted = jnp.ones_like(targets, bool) if mask is None else mask.astype(bool)
    earlier = _earlier(targets, segment) & counted[:, None, :]  # [B, T, S]: target s is before t
    same = targets[:, :, None] == targets[:, None, :]
    first = ~jnp.any(same & earlier, axis=2)  # [B, S]: the token occurs here for the first time
    candidates = earlier & first[:, None, :] & ~same
    # Every candidate is an earlier target: [B, T, T] instead of [B, T, V].
    logp = _at_targets(logits, targets) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    penalty = jnp.sum(jnp.where(candidates, -_log_rest(logp, _LEAST), 0), axis=2)
    return jnp.where(counted, penalty, 0)


def sequence_unlikelihood(logprobs: jax.Array, repeated: jax.Array) -> jax.Array:
    """The penalty of sequence-level unlikelihood (Welleck et al. 2020, eq. 7) of each token of a greedy continuation.

    Args:
        logprobs: Of the continuation's tokens, [B, T].
        repeated: From `repeated_ngrams`, bool [B, T].

    Returns:
        Nats, [B, T]; divide their sum by the number of all tokens of the continuations.
    """
    return jnp.where(repeated, -_log_rest(logprobs, _LEAST_SEQUENCE), 0)


def repeated_ngrams(tokens: jax.Array, n: int, mask: jax.Array | None = None) -> jax.Array:
    """Which tokens lie in an n-gram that has occurred in the row before.

    The original code never looks at the last n-gram of a row; this one does.

    Args:
        tokens: int32 [B, T].
        n: At least 1.
        mask: 1 at tokens of the continuation, [B, T]; an n-gram lies within it. None is all.

    Returns:
        bool [B, T].
    """
    rows, length = tokens.shape
    if length < n:
        return jnp.zeros(tokens.shape, bool)
    starts = length - n + 1
    counted = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    whole = jnp.ones((rows, starts), bool)
    equal = jnp.ones((rows, starts, starts), bool)
    for i in range(n):
        shifted = tokens[:, i : i + starts]
        equal &= shifted[:, :, None] == shifted[:, None, :]
        whole &= counted[:, i : i + starts]
    earlier = jnp.tril(jnp.ones((starts, starts), bool), -1)[None]
    seen = jnp.any(equal & earlier & whole[:, None, :], axis=2) & whole  # [B, starts]
    found = jnp.zeros(tokens.shape, bool)
    for i in range(n):
        found = found.at[:, i : i + starts].set(found[:, i : i + starts] | seen)
    return found


def scalegrad(
    logits: jax.Array, targets: jax.Array, *, gamma: float = 0.2, segment: jax.Array | None = None
) -> jax.Array:
    """ScaleGrad (Lin et al. 2021, eq. 3): cross entropy with the probabilities of novel tokens scaled by gamma.

    A token is novel where it is not among the earlier targets of the document.

    Args:
        logits: [B, T, V].
        targets: int32 [B, T].
        gamma: Between 0 and 1; 1 is the ordinary cross entropy.
        segment: Documents of packed rows, int32 [B, T].

    Returns:
        Nats of each target, [B, T].
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)  # [B, S, V]
    earlier = _earlier(targets, segment).astype(logits.dtype)
    novel = jnp.einsum("BTS,BSV->BTV", earlier, one_hot) == 0
    scaled = logits + jnp.where(novel, jnp.log(jnp.asarray(gamma, logits.dtype)), 0)
    return jax.nn.logsumexp(scaled, axis=-1) - jnp.sum(scaled * one_hot, axis=-1)


def ditto(logprobs: jax.Array, before: jax.Array, repeated: jax.Array, *, decay: float = 0.5) -> jax.Array:
    """DITTO's loss (Xu et al. 2022, eq. 3) on a sentence that the data repeat again and again.

    -log(1 - |p_n - decay * p_(n-1)|) with p_n the probability of a token in the n-th repetition, for n of at least 2.

    Args:
        logprobs: Of the tokens, [B, T].
        before: Place of the same token in the repetition before, int32 [B, T].
        repeated: Whether there is a repetition before, bool [B, T].
        decay: lambda: 0.5 for open-ended text, 0.9 for summaries.

    Returns:
        Nats, [B, T], 0 where nothing is repeated.
    """
    p = jnp.exp(logprobs)
    previous = jax.lax.stop_gradient(jnp.take_along_axis(p, before, axis=1))
    rest = jnp.maximum(1 - jnp.abs(p - decay * previous), _LEAST_SEQUENCE)
    return jnp.where(repeated, -jnp.log(rest), 0)


def coverage(attention: jax.Array) -> jax.Array:
    """The coverage loss (See et al. 2017, eq. 12): attention once more to places that were attended to before.

    At each step it is the sum over places of the lesser of the attention and of the sum of that of all earlier steps.
    It is meant for one attention over a source; self-attention never forms these weights here, so that a caller who
    wants it computes them (docs/alignment.md).

    Args:
        attention: Of T steps over S places, non-negative, [..., T, S].

    Returns:
        [..., T]; 0 at the first step.
    """
    attention = attention.astype(at_least_float32(attention.dtype))
    before = jnp.cumsum(attention, axis=-2) - attention
    return jnp.sum(jnp.minimum(attention, before), axis=-1)


def _earlier(targets: jax.Array, segment: jax.Array | None) -> jax.Array:
    """Whether target s comes before target t in the same document, bool [B, T, S]."""
    length = targets.shape[1]
    earlier = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool), -1)[None], (len(targets), length, length))
    return earlier if segment is None else earlier & (segment[:, :, None] == segment[:, None, :])


def _at_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logit at place t of the target at place s, [B, T, S]."""
    if jax.typeof(logits).sharding.mesh.empty:
        index = jnp.broadcast_to(targets[:, None, :], (*targets.shape, targets.shape[1]))
        return jnp.take_along_axis(logits, index, axis=2)
    # A gather does not work on a sharded vocabulary; a product with one-hot rows does, and is as exact.
    one_hot = (targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)).astype(logits.dtype)
    sharding = P(*spec_of(logits)[:2], None)
    one_hot = jax.sharding.reshard(one_hot, P(spec_of(logits)[0], None, spec_of(logits)[2]))
    return jnp.einsum("BTV,BSV->BTS", logits, one_hot, out_sharding=sharding, precision="highest")


def _log_rest(logp: jax.Array, least: float) -> jax.Array:
    """log(max(1 - p, least)), exact for small p."""
    rest = -jnp.expm1(jnp.minimum(logp, 0))
    return jnp.log(jnp.maximum(rest, least))
