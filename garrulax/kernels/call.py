"""What every implementation of attention is given, and what it gives back."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
from flax import struct

from garrulax.kernels.mask import Rule, Streams

NOTHING = 2.0**30  # the lse that backward passes are given of a row without keys: exp(score - NOTHING) is 0


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a request: another one is another program.

    rule: who attends to whom.
    scale: of the products of queries and keys.
    softcap: scores become softcap * tanh(scores / softcap), after scaling and before anything is added; None is none.
    dropout: rate on the probabilities; 0.0 where there is none.
    starts: for `Operands.steps`: ascending distances (key position - query position) at which the next step begins.
    causal: known without the streams: query t sees the keys 0, 1, ..., t and no other. For libraries without streams.
    """

    rule: Rule
    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    starts: tuple[int, ...] = ()
    causal: bool = False


@struct.dataclass
class Operands:
    """The arrays of a request. Score of a pair: softcap(scale * query·key) + bias + slope * distance + step(distance),
    with distance = key position - query position.

    query: [B, T, H, C]. key: [B, S, K, C]. value: [B, S, K, Cv]. H = K·G; query head h reads key/value head h // G.
    query_streams, key_streams: int32 [B, T] and [B, S] by name: those that the rule reads, and `position` for slopes
    and steps.
    bias: [B or 1, H or 1, T or 1, S], any floating dtype.
    slopes: float32 [H], constants (their gradient is not taken).
    steps: float32 [len(starts) + 1, H]: what is added from one start to the next; the first is below all starts.
    seeds: uint32 [B, H], for dropout: `dropout.kept` makes every pair's number of its row's seed and its place.
    sinks: [H]; exp(sink) is added to the sum that a query's exponentials are divided by (learned sinks, as of gpt-oss).
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    query_streams: Streams
    key_streams: Streams
    bias: jax.Array | None = None
    slopes: jax.Array | None = None
    steps: jax.Array | None = None
    seeds: jax.Array | None = None
    sinks: jax.Array | None = None


class Gradients(NamedTuple):
    """Gradients of operands, in their shapes and dtypes; None for those that were not given."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    steps: jax.Array | None = None


class Implementation(Protocol):
    """One way to compute attention; hashable. `kernels.passes.TwoPasses` makes one of a forward and a backward pass."""

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why it cannot compute this request (operands may be abstract), or None where it can."""

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output [B, T, H, Cv] in the query's dtype, differentiable; 0 where a query sees nothing."""
