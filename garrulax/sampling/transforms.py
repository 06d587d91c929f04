"""Transforms of logits (temperature, top-k, top-p), which compose like Optax's, and sampling of a token.

    transform = chain(temperature(), top_k(), top_p())      # applied from left to right
    state = transform.init(knobs)                           # knobs: name -> [B], one value a row
    logits, state = transform.update(logits, state)         # [B, V]; -inf for a token that must not be sampled

A knob is a sampling parameter of a row, such as its temperature. The choice of transforms is fixed when a program is
traced; the values of knobs are arrays, so that one executable serves all values. Letters: B rows, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Knobs = Mapping[str, Any]


class Transform(NamedTuple):
    """A pure change of the logits, with a state.

    `generate` compiles once for each transform, so define a transform once and use it often. The factories of this
    module return the same object for equal arguments.

    Attributes:
        init: Function from knobs (name -> [B]) to the first state, a pytree of arrays whose first axis is B.
        update: Function from (logits float32 [B, V], state) to (logits float32 [B, V], state).
        observe: Function from (token int32 [B], state) to state, called with the token that each row got.
    """

    init: Callable[[Knobs], Any]
    update: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
    observe: Callable[[jax.Array, Any], Any] = lambda token, state: state


@functools.cache  # jit compares transforms by identity: an equal chain must be the same object
def chain(*transforms: Transform) -> Transform:
    """Applies transforms one after another, in the order given. The state is the tuple of their states."""

    def init(knobs):
        return tuple(t.init(knobs) for t in transforms)

    def update(logits, states):
        new_states = []
        for transform, state in zip(transforms, states, strict=True):
            logits, state = transform.update(logits, state)
            new_states.append(state)
        return logits, tuple(new_states)

    def observe(token, states):
        return tuple(t.observe(token, state) for t, state in zip(transforms, states, strict=True))

    return Transform(init, update, observe)


@functools.cache
def temperature() -> Transform:
    """Divides logits by the knob `temperature` (float32 [B]) and shifts each row by a constant.

    Temperature 0 keeps only the greatest logit; of several equal ones, the first.
    """

    def update(logits, value):
        positive = value > 0  # [B]
        # Subtract the maximum first: no difference overflows, however low the temperature.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(positive, value, 1)[:, None]  # [B, V]
        greedy = jnp.where(_index(logits) == argmax(logits)[:, None], jnp.zeros_like(logits), -jnp.inf)  # [B, V]
        return jnp.where(positive[:, None], scaled, greedy), value

    return Transform(lambda knobs: knobs["temperature"], update)


@functools.cache
def top_k() -> Transform:
    """Keeps the k greatest logits (Fan et al. 2018); knob `top_k` (int32 [B]), 0 keeps all.

    Tokens that tie with the k-th are kept, as in transformers.
    """

    def cut(logits, k):
        keep = top_mask(logits, jnp.ones_like(logits), k.astype(jnp.float32))
        return jnp.where(keep | (k == 0)[:, None], logits, -jnp.inf)

    def update(logits, k):
        return jax.lax.cond(jnp.any(k > 0), cut, lambda x, _: x, logits, k), k

    return Transform(lambda knobs: knobs["top_k"], update)


@functools.cache
def top_p() -> Transform:
    """Keeps the nucleus (Holtzman et al. 2020): the most probable tokens whose probabilities sum to p.

    The knob is `top_p` (float32 [B]); 1 keeps all. A token is kept if the sum over all more probable tokens is less
    than p, so at least one token is kept. Equally probable tokens are kept or removed together (transformers keeps as
    many of them as its sort puts first).
    """

    def cut(logits, p):
        keep = top_mask(logits, jax.nn.softmax(logits, axis=-1), p)
        return jnp.where(keep | (p >= 1)[:, None], logits, -jnp.inf)

    def update(logits, p):
        return jax.lax.cond(jnp.any(p < 1), cut, lambda x, _: x, logits, p), p

    return Transform(lambda knobs: knobs["top_p"], update)


@functools.cache
def only(size: int, others: tuple[int, ...] = ()) -> Transform:
    """Keeps the ids below `size`, and `others`."""

    def update(logits, state):
        ids = np.arange(logits.shape[-1])[None]  # [1, V]
        return jnp.where((ids < size) | np.isin(ids, others), logits, -jnp.inf), state

    return Transform(lambda knobs: (), update)


def top_mask(values: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Selects the greatest values of each row until their weights reach a limit.

    Finds the smallest selected value by bisection of its 32 bits, with one sum over the row for each bit. This is exact
    and on every platform far cheaper than a sort.

    Args:
        values: float32 [B, V].
        weights: float32 [B, V], not negative.
        limit: float32 [B].

    Returns:
        bool [B, V], True where the weights of all greater values of the row sum to less than its limit.
    """
    values = values.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)  # [B, V]; -0 becomes 0
    negative = (bits >> 31).astype(bool)
    order = jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))  # [B, V], integers in the order of the values

    def decide_bit(i, low):  # low: uint32 [B], the answer's bits above bit 31 - i; the others are 0
        half = jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        middle = low + (half - 1)
        weight_above = jnp.sum(jnp.where(order > middle[:, None], weights, 0), axis=-1)  # [B]
        return jnp.where(weight_above < limit, low, low + half)

    smallest = jax.lax.fori_loop(0, 32, decide_bit, jnp.zeros(values.shape[0], jnp.uint32))
    return order >= smallest[:, None]


def sample(logits: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
    """Samples one token of each row from softmax(logits).

    The token of a row depends only on its logits, seed and position. Adds Gumbel noise and takes the greatest entry
    (Gumbel 1954): exact, in one pass.

    Args:
        logits: float32 [B, V].
        seed: uint32 [B].
        position: int32 [B], index into the random stream of the seed.

    Returns:
        int32 [B].
    """

    def noise(seed, position):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        # The default mode has 23 random bits: too coarse for tokens rarer than 1e-7, of which there are many.
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32, mode="high")

    several = jnp.sum(logits > -jnp.inf, axis=-1) > 1  # [B]; a greedy row has one candidate and needs no noise
    noisy = jax.lax.cond(
        jnp.any(several), lambda x: x + jax.vmap(noise)(seed, position), lambda x: x, logits
    )  # fmt: skip
    return argmax(noisy)


def argmax(logits: jax.Array) -> jax.Array:
    """Index of the greatest entry of each row of [B, V], of several equal ones the first: int32 [B].

    `jnp.argmax` in two passes, which XLA:CPU vectorises: four times faster there.
    """
    size = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)  # [B, 1]
    index = jnp.min(jnp.where(logits == top, _index(logits), size), axis=-1)  # [B]
    return jnp.minimum(index, size - 1)  # in a row of NaN no entry equals the maximum


def _index(logits: jax.Array) -> jax.Array:
    """int32 [1, V]: 0, 1, 2, ..."""
    return jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]


#: Temperature, then top-k, then top-p: the order of transformers and vLLM.
DEFAULT = chain(temperature(), top_k(), top_p())
