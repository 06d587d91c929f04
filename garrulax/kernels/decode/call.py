"""What every implementation of decoding attention is given: a few queries of each sequence over its cache."""

import jax
from flax import struct

from garrulax.kernels.mask import Streams


@struct.dataclass
class Cached:
    """The arrays of a request; its static part is `kernels.call.Options`, without dropout.

    query: [B, T, H, C], the newest token of each sequence, or T drafts. H = K·G.
    key, value: contiguous [B, K, S, C] and [B, K, S, Cv], or pages [P, K, page, C] and [P, K, page, Cv]; floating, or
    int8, float8_e4m3fn or float8_e5m2 with scales. They hold the T newest tokens too.
    query_streams: int32 [B, T] by name. key_streams: int32 [B, S], or [P, page], by name.
    table: int32 [B, N], the pages of each sequence in order; entries behind its length are not read as pages. None
    where the cache is contiguous.
    lengths: int32 [B], how many slots of each sequence count, in order; None is all.
    key_scales, value_scales: float32 [B, K, S] or [P, K, page]: what a slot's entries are multiplied by.
    slopes, steps, sinks: as of `kernels.call.Operands`.
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
