"""`Transform`, `chain`, and the sampling of a token. Letters: B rows, V vocabulary."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Knobs = Mapping[str, Any]


def keep(token: jax.Array, state: Any) -> Any:
    """The `observe` of a transform whose state does not depend on the sampled tokens: returns the state."""
    return state


class Transform(NamedTuple):
    """A pure change of the logits, with a state.

    `generate` compiles once for each transform, so define a transform once and use it often. The factories of this
    package return the same object for equal arguments.

    Attributes:
        init: Function from knobs (name -> [B, ...], one value a row, and the reserved names of
            `sampling.transforms`) to the first state, a pytree of arrays whose first axis is B.
        update: Function from (logits float32 [B, V], state) to (logits float32 [B, V], state); -inf for a token that
            must not be sampled.
        observe: Function from (token int32 [B], state) to the state after this token was sampled, or forced, for each
            row. By default the state stays as it is.
        is_on: Function from the state to bool [B], for a transform whose `update` never changes its state, and changes
            logits only where this holds in some row. A chain leaves out several of them in a row by one decision.
    """

    init: Callable[[Knobs], Any]
    update: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
    observe: Callable[[jax.Array, Any], Any] = keep
    is_on: Callable[[Any], jax.Array] | None = None


@functools.cache  # jit compares transforms by identity: an equal chain must be the same object
def chain(*transforms: Transform) -> Transform:
    """Applies transforms one after another, in the order given. The state is the tuple of their states."""

    def init(knobs):
        return tuple(t.init(knobs) for t in transforms)

    def update(logits, states):
        new_states: list[Any] = []
        pairs = zip(transforms, states, strict=True)
        for optional, group in itertools.groupby(pairs, lambda pair: pair[0].is_on is not None):
            parts, kept = zip(*group, strict=True)
            if optional and len(parts) > 1:  # one decision for all: on a GPU the host waits for each
                on = [t.is_on(state) for t, state in zip(parts, kept, strict=True) if t.is_on is not None]
                all_of_them = functools.partial(_update_all, parts)
                logits = only_if(functools.reduce(jnp.logical_or, on), all_of_them, logits, *kept)
                new_states += kept
                continue
            for transform, state in zip(parts, kept, strict=True):
                logits, state = transform.update(logits, state)
                new_states.append(state)
        return logits, tuple(new_states)

    def observe(token, states):
        return tuple(t.observe(token, state) for t, state in zip(transforms, states, strict=True))

    return Transform(init, update, observe)


def _update_all(transforms: Sequence[Transform], logits: jax.Array, *states: Any) -> jax.Array:
    """The logits after transforms that keep their states."""
    for transform, state in zip(transforms, states, strict=True):
        logits, _ = transform.update(logits, state)
    return logits


def only_if(is_on: jax.Array, change: Callable[..., jax.Array], logits: jax.Array, *operands: Any) -> jax.Array:
    """Returns change(logits, *operands) if `is_on` (bool, any shape) holds anywhere, otherwise the logits.

    A transform whose knob is off in all rows costs nothing.
    """
    return jax.lax.cond(jnp.any(is_on), change, lambda x, *_: x, logits, *operands)


def sample(logits: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
    """Samples one token of each row from softmax(logits).

    The token of a row depends only on its logits, seed and position. Adds Gumbel noise and takes the greatest entry
    (Gumbel 1954): exact, in one pass.

    Args:
        logits: float32 [B, V]; other dtypes become float32, since in bfloat16 rare tokens would never be sampled.
        seed: uint32 [B].
        position: int32 [B], index into the random stream of the seed.

    Returns:
        int32 [B].
    """
    logits = logits.astype(jnp.float32)

    def noise(seed, position):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        # The default mode has 23 random bits: too coarse for tokens rarer than 1e-7, of which there are many.
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32, mode="high")

    def noisy(logits):
        return logits + jax.vmap(noise)(seed, position)

    if jax.default_backend() == "gpu":  # there the noise takes less time than the host, which would wait for a decision
        return argmax(noisy(logits))
    several = jnp.sum(logits > -jnp.inf, axis=-1) > 1  # [B]; a greedy row has one candidate and needs no noise
    return argmax(only_if(several, noisy, logits))


def argmax(logits: jax.Array) -> jax.Array:
    """Index of the greatest entry of each row of [B, V], of several equal ones the first: int32 [B].

    On CPUs in two passes, which XLA:CPU vectorises: four times faster there than `jnp.argmax`. On a GPU that is one
    reduction, and two passes are two, of two kernels each.
    """
    if jax.default_backend() != "cpu":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    size = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)  # [B, 1]
    index = jnp.min(jnp.where(logits == top, token_ids(logits), size), axis=-1)  # [B]
    return jnp.minimum(index, size - 1)  # in a row of NaN no entry equals the maximum


def token_ids(logits: jax.Array) -> jax.Array:
    """int32 [1, V]: 0, 1, 2, ..."""
    return jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
