"""The arguments of every implementation of decoding attention: a few queries of each sequence over its cache."""

import dataclasses

import jax

from garrulax.kernels.mask import Streams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOperands:
    """The arrays of a decoding request; the static part is `kernels.call.Options`, without dropout.

    Attributes:
        query: [B, T, H, C]: the newest token of each sequence, or T draft tokens. H = K·G.
        key: [B, K, S, C], or pages [P, K, page, C]; floating, or int8, float8_e4m3fn or float8_e5m2 with scales. The
            cache already contains the T newest tokens.
        value: [B, K, S, Cv], or pages [P, K, page, Cv], likewise.
        query_streams: int32 [B, T] by name.
        key_streams: int32 [B, S], or [P, page], by name.
        table: int32 [B, N], the pages of each sequence in order; None for a contiguous cache. Entries beyond the
            sequence's length may hold any number.
        lengths: int32 [B], the number of valid slots of each sequence, its first ones; None is all.
        key_scales: float32 [B, K, S] or [P, K, page], the factor of each slot's key; None without quantisation.
        value_scales: Likewise for values.
        slopes: As in `kernels.call.Operands`.
        steps: As in `kernels.call.Operands`.
        sinks: As in `kernels.call.Operands`.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    query_streams: Streams
    key_streams: Streams
    table: jax.Array | None = None
    lengths: jax.Array | None = None
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    slopes: jax.Array | None = None
    steps: jax.Array | None = None
    sinks: jax.Array | None = None
