"""What turns a model's logits into the distribution that is drawn from: transforms composed like Optax's.

    shape = chain(temperature(), top_k(), top_p())      # the order is the semantics; this one is transformers'
    state = shape.init(knobs)                           # knobs: name -> [B], one value a row
    logits, state = shape.update(logits, state)         # float32 [B, V]; a token that must not be drawn gets -inf

Which transforms there are is fixed when a program is traced; how strong they are is data, so that one executable
serves all values. Letters: B rows, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Knobs = Mapping[str, Any]


class Transform(NamedTuple):
    """A pure change of the logits, with a state of its own.

    init: knobs (name -> [B]) -> state, any pytree of arrays whose first axis is the rows.
    update: (logits float32 [B, V], state) -> (logits float32 [B, V], state).
    """

    init: Callable[[Knobs], Any]
    update: Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def chain(*transforms: Transform) -> Transform:
    """The transforms one after another, in the order given. The state is the tuple of theirs."""

    def init(knobs):
        return tuple(t.init(knobs) for t in transforms)

    def update(logits, states):
        new = []
        for transform, state in zip(transforms, states, strict=True):
            logits, state = transform.update(logits, state)
            new.append(state)
        return logits, tuple(new)

    return Transform(init, update)


def temperature() -> Transform:
    """Logits divided by the knob `temperature` (float32 [B]), up to a constant a row; 0 leaves only the greatest
    logit, of several equal ones the first."""

    def update(logits, value):
        hot = value > 0
        best = greatest(logits)
        # The greatest becomes 0 first, so that no temperature overflows.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(hot, value, 1)[:, None]
        greedy = jnp.where(jnp.arange(logits.shape[-1]) == best[:, None], 0.0, -jnp.inf)
        return jnp.where(hot[:, None], scaled, greedy), value

    return Transform(lambda knobs: knobs["temperature"], update)


def top_k() -> Transform:
    """Only the k greatest logits (Fan et al. 2018); knob `top_k` (int32 [B]), 0 is off.

    Tokens that tie with the k-th stay, as in transformers.
    """

    def cut(logits, k):
        kept = at_least(logits, jnp.ones_like(logits), k.astype(jnp.float32))
        return jnp.where(kept | (k == 0)[:, None], logits, -jnp.inf)

    def update(logits, k):
        return jax.lax.cond(jnp.any(k > 0), cut, lambda x, _: x, logits, k), k

    return Transform(lambda knobs: knobs["top_k"], update)


def top_p() -> Transform:
    """Only the nucleus: the most probable tokens that together have probability p (Holtzman et al. 2020); knob
    `top_p` (float32 [B]), 1 is off.

    A token stays while those more probable than it have less than p together: at least one stays, and the one that
    reaches p. Equally probable tokens stay or go together (transformers keeps as many of them as its sort puts first).
    """

    def cut(logits, p):
        kept = at_least(logits, jax.nn.softmax(logits, axis=-1), p)
        return jnp.where(kept | (p >= 1)[:, None], logits, -jnp.inf)

    def update(logits, p):
        return jax.lax.cond(jnp.any(p < 1), cut, lambda x, _: x, logits, p), p

    return Transform(lambda knobs: knobs["top_p"], update)


def at_least(values: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Where the greater values of a row weigh less than its limit together: bool [B, V].

    values, weights: float32 [B, V]; limit: float32 [B]. The smallest value that stays is found by bisection of its
    32 bits, one sum over the row each: exact, and far cheaper than a sort on every platform.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)  # -0 is 0
    negative = (bits >> 31).astype(bool)
    order = jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))  # integers in the order of the values

    def narrow(i, low):
        half = jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        middle = low + (half - 1)
        above = jnp.sum(jnp.where(order > middle[:, None], weights, 0), axis=-1)
        return jnp.where(above < limit, low, low + half)

    smallest = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(values.shape[0], jnp.uint32))
    return order >= smallest[:, None]


def draw(logits: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
    """One token a row from softmax(logits): int32 [B].

    logits: float32 [B, V]. seed: uint32 [B]. position: int32 [B], which of the draws with this seed it is. A row's
    token depends on nothing else. Adds Gumbel noise and takes the greatest (Gumbel 1954): exact, in one pass.
    """

    def noise(seed, position):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        # The default mode has 23 random bits: too coarse for tokens rarer than 1e-7, of which there are many.
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32, mode="high")

    open_rows = jnp.sum(logits > -jnp.inf, axis=-1) > 1  # a greedy row has one token left and needs no noise
    noisy = jax.lax.cond(
        jnp.any(open_rows), lambda x: x + jax.vmap(noise)(seed, position), lambda x: x, logits
    )  # fmt: skip
    return greatest(noisy)


def greatest(logits: jax.Array) -> jax.Array:
    """Index of the greatest entry of a row, of several equal ones the first: int32 [B] of [B, V].

    `jnp.argmax` in two passes that XLA:CPU vectorises: four times faster there.
    """
    size = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.min(jnp.where(logits == top, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    return jnp.minimum(index, size - 1)  # a row of NaN equals nothing


#: Temperature, then top-k, then top-p: the order of transformers and vLLM.
STANDARD = chain(temperature(), top_k(), top_p())
