"""The arguments and results of every implementation of attention."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from garrulax.kernels.mask import Rule, Streams

#: Backward passes get this instead of -inf as the lse of a query that attends to no key: exp(score - 2**30) is 0, while
#: exp(-inf - -inf) would be NaN.
EMPTY_ROW_LSE = 2.0**30


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a request: a change of any field compiles another program.

    Attributes:
        rule: Which query attends to which key, over the streams of `Operands`.
        scale: Factor on the products of queries and keys.
        softcap: If given, scores become softcap * tanh(scores / softcap), after scaling and before anything is added.
        dropout: Rate of dropout on the probabilities; 0.0 is none.
        starts: For `Operands.steps`: ascending distances at which the next step begins.
        causal: True if query t attends exactly to the keys 0, 1, ..., t whatever the streams hold. Libraries without
            streams (cuDNN) then use their own causal mask.
        context_parallel: Where a mesh splits the sequence, how queries get the keys of other devices: a name in
            `sequence.STRATEGIES`, or None for the cheaper one (`sequence.choose_strategy`).
    """

    rule: Rule
    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    starts: tuple[int, ...] = ()
    causal: bool = False
    context_parallel: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a request.

    The score of a pair is softcap(scale * query·key) + bias + slope * distance + step(distance), where distance is key
    position - query position.

    Attributes:
        query: [B, T, H, C], with H = K·G: query head h reads key/value head h // G.
        key: [B, S, K, C].
        value: [B, S, K, Cv].
        query_streams: int32 [B, T] by name: the streams that the rule reads, and `position` where there are slopes or
            steps.
        key_streams: int32 [B, S] by name, likewise.
        bias: [B or 1, H or 1, T or 1, S], any floating dtype.
        slopes: float32 [H], ALiBi's; constants, so they get no gradient.
        steps: float32 [len(starts) + 1, H], a bias that is constant between two starts: steps[0] where distance <
            starts[0], steps[i] where starts[i - 1] <= distance < starts[i], the last one from the last start on.
        seeds: uint32 [B, H], for dropout: `dropout.keep_mask` hashes the seed of a row and head with the places of
            query and key.
        sinks: [H], learned (gpt-oss): exp(sink) is added to the denominator of the softmax.
        lists: The result of `ForwardBackward.lists`, where gradients are wanted.
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
    lists: Any = None


class LogSumExp(NamedTuple):
    """lse, the logarithm of the sum of exp(score) over the keys of each query, as the sum of two parts.

    Two, because a float32 of the size of 1e9, as in additive masks, has no digits left for the logarithm of a number of
    keys. The probability exp(score - lse) is exp((score - top) - rest): the first difference is exact where it matters.

    Attributes:
        top: [B, H, T], in at least float32: the greatest score, or any number close to lse; -inf for a query that
            attends to no key.
        rest: Of the same shape and dtype: lse - top, 0 for a query that attends to no key.
    """

    top: jax.Array
    rest: jax.Array

    @property
    def value(self) -> jax.Array:
        """lse, rounded to one number."""
        return self.top + self.rest

    @classmethod
    def rounded(cls, lse: jax.Array) -> "LogSumExp":
        """From an lse that is known as one number."""
        return cls(lse, jnp.zeros_like(lse))


class Gradients(NamedTuple):
    """Gradients of the operands of the same names, in their shapes and dtypes; None for operands that were None."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    steps: jax.Array | None = None


class Implementation(Protocol):
    """One way to compute attention; hashable.

    `kernels.passes.ForwardBackward` makes one from a forward and a backward pass.
    """

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why it cannot compute this request (the operands may be abstract), or None where it can."""

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output [B, T, H, Cv] in the query's dtype, differentiable; 0 for a query that attends to no key."""
