"""Requests that `attention_check.py` compares: every mask, everything beside a mask, and widths of heads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels import masks
from garrulax.kernels.mask import INF, PAD, SAME_SEGMENT, Band, Mask
from garrulax.kernels.relative import t5

ROWS = 2  # of a batch
AnyMask = Mask | tuple[Mask, ...] | None


def _index(T: int) -> np.ndarray:
    return np.broadcast_to(np.arange(T), (ROWS, T))


def _documents(random: np.random.Generator, T: int) -> jax.Array:
    """Packed rows: documents of random lengths, and padding behind those of the second row."""
    cuts = np.sort(random.integers(1, T, (ROWS, 3)), axis=1)
    segment = np.stack([np.searchsorted(c, np.arange(T), side="right") for c in cuts])
    segment[1][segment[1] == 3] = PAD
    return jnp.asarray(segment, jnp.int32)


def _streams(rule: Any, **streams: np.ndarray) -> Mask:
    return Mask({name: jnp.asarray(s, jnp.int32) for name, s in streams.items()}, None, rule)


def _outside(random: np.random.Generator, T: int) -> Mask:
    """A rule with `~`: everything but the own document and the far past."""
    segment = np.abs(np.asarray(_documents(random, T)))
    return _streams(~SAME_SEGMENT & ~Band("rank", T // 2, INF), rank=_index(T), segment=segment)


def _nothing(random: np.random.Generator, T: int) -> Mask:
    """Half of the first row is padding, and all of the second."""
    padding = (_index(T) < T // 2) | (np.arange(ROWS)[:, None] == 1)
    return masks.packed(jnp.asarray(np.where(padding, PAD, 0), jnp.int32))


def _within(random: np.random.Generator, T: int) -> Mask:
    """The width of the window is data."""
    mask = with_positions(masks.packed(_documents(random, T)))
    return masks.within(mask, jnp.int32(random.integers(1, T)), stride=16)


def _contexts(random: np.random.Generator, T: int) -> jax.Array:
    return jnp.asarray(random.integers(1, T, ROWS), jnp.int32)


def _drafts(random: np.random.Generator, T: int) -> Mask:
    """A tree of 90 drafts behind a cache of T - 90 slots, of which the rows fill different shares."""
    count = min(90, T // 2)
    parents = [int(random.integers(-1, i)) if i else -1 for i in range(count)]
    used = random.integers(1, T - count, (ROWS, 1))
    slots = np.where(_index(T) < used, masks.COMMITTED, masks.EMPTY)
    slots = np.where(_index(T) >= T - count, _index(T) - (T - count), slots)
    return masks.tree(parents, jnp.asarray(slots, jnp.int32))


#: Masks by name: built of a random generator and the number of keys.
MASKS: dict[str, Callable[[np.random.Generator, int], AnyMask]] = {
    "full": lambda r, T: None,
    "causal": lambda r, T: masks.causal(ROWS, T),
    "padded": lambda r, T: masks.padded(jnp.asarray(_index(T) < r.integers(1, T, (ROWS, 1)))),
    "packed": lambda r, T: masks.packed(_documents(r, T)),
    "bidirectional": lambda r, T: masks.bidirectional(_documents(r, T)),
    "prefix": lambda r, T: masks.prefix(_contexts(r, T), T),
    "infilling": lambda r, T: masks.infilling(_documents(r, T), jnp.asarray(_index(T) % 200 < 120)),
    "choices": lambda r, T: masks.choices(_documents(r, T)),
    "window": lambda r, T: masks.window(_documents(r, T), max(2, T // 5)),
    "within": _within,
    "strided": lambda r, T: masks.strided(_documents(r, T), 40, 16),
    "fixed": lambda r, T: masks.fixed(_documents(r, T), 32, 4),
    "sinks_and_window": lambda r, T: masks.sinks_and_window(_documents(r, T), 4, max(2, T // 6)),
    "bigbird": lambda r, T: masks.bigbird(_documents(r, T), jax.random.key(int(r.integers(2**31))), block=16),
    "shifted": lambda r, T: masks.shifted(_documents(r, T), 128),
    "drafts": _drafts,
    "a rule with ~": _outside,
    "nothing": _nothing,
}


def with_positions(mask: Mask) -> Mask:
    """The mask with a stream `position` on both sides, for distances."""
    key = mask.key_streams()
    T, S = (next(iter(streams.values())).shape[1] for streams in (mask.query, key))
    slots = jnp.asarray(_index(S), jnp.int32)
    return dataclasses.replace(
        mask, query={**mask.query, "position": slots[:, S - T :]}, key={**key, "position": slots}
    )


#: What can be asked for beside a mask: arguments of `attention` for H heads, T queries and S keys.
EXTRAS: dict[str, Callable[[np.random.Generator, int, int, int], dict[str, Any]]] = {
    "softcap": lambda r, H, T, S: {"softcap": 2.0},
    "scale": lambda r, H, T, S: {"scale": 0.3},
    "ALiBi": lambda r, H, T, S: {"alibi": jnp.asarray(2.0 ** -np.arange(1, H + 1), jnp.float32)},
    "sinks": lambda r, H, T, S: {"sinks": _normal(r, H)},
    "relative": lambda r, H, T, S: {"relative": t5(_normal(r, 32, H), bidirectional=True, max_distance=64)},
    "bias": lambda r, H, T, S: {"bias": _normal(r, ROWS, H, T, S)},
    "shared bias": lambda r, H, T, S: {"bias": _normal(r, 1, 1, T, S)},
    "bias of keys": lambda r, H, T, S: {"bias": _normal(r, ROWS, 1, 1, S)},
    "dropout": lambda r, H, T, S: {"dropout": 0.2, "dropout_key": jax.random.key(int(r.integers(2**31)))},
}


def _normal(random: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(random.normal(size=shape), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        mask: A name in `MASKS`.
        extras: Names in `EXTRAS`.
        width: Of a head.
        value_width: Of a value, if it differs.
        heads: Of queries.
        kv_heads: Of keys and values.
        length: Of the text; None is that of most cases.
        queries: Their number, if it is not that of the keys.
        dtypes: Each is compared.
    """

    mask: str
    extras: tuple[str, ...] = ()
    width: int = 128
    value_width: int | None = None
    heads: int = 4
    kv_heads: int = 2
    length: int | None = None
    queries: int | None = None
    dtypes: tuple[str, ...] = ("bfloat16",)

    @property
    def name(self) -> str:
        """For people."""
        widths = f"D{self.width}" + (f"/{self.value_width}" if self.value_width else "")
        more = f" T{self.length}" if self.length else ""
        more += f" {self.queries} queries" if self.queries else ""
        return " + ".join((self.mask, *self.extras)) + f" {widths} {self.heads}/{self.kv_heads} heads{more}"


BOTH = ("bfloat16", "float16")
LONG = 16384
CASES = (
    *(Case(mask) for mask in MASKS),
    *(Case("packed" if extra == "dropout" else "causal", (extra,)) for extra in EXTRAS),
    *(Case("causal", width=width, dtypes=BOTH) for width in (64, 72, 80, 96, 112, 256)),
    Case("causal", dtypes=("float16",)),
    Case("causal", width=192, value_width=128, dtypes=BOTH),
    *(Case(mask, extras, width=w) for w in (64, 256) for mask, extras in (("packed", ()), ("window", ("ALiBi",)))),
    Case("window", ("softcap", "sinks"), width=64),
    Case("causal", heads=4, kv_heads=4),
    Case("causal", width=64, heads=8, kv_heads=1),
    Case("full", length=1000, queries=300),
    # Other sizes of blocks are chosen for long texts.
    Case("causal", width=64, heads=2, kv_heads=1, length=LONG),
    Case("packed", heads=2, kv_heads=1, length=LONG),
)
TINY = (CASES[1], CASES[14], CASES[21], CASES[28])


def request(case: Case, seed: int, length: int) -> tuple[tuple, AnyMask, dict[str, Any], jax.Array]:
    """query, key and value; the mask; further arguments; the cotangent of the output: float32, new for each seed."""
    random = np.random.default_rng(seed)
    S = case.length or length
    mask = MASKS[case.mask](random, S)
    T = case.queries or (S if not isinstance(mask, Mask) else next(iter(mask.query.values())).shape[1])
    extras: dict[str, Any] = {}
    for name in case.extras:
        extras |= EXTRAS[name](random, case.heads, T, S)
    if isinstance(mask, Mask) and {"alibi", "relative"} & set(extras):
        mask = with_positions(mask)
    values = case.value_width or case.width
    shapes = (T, case.heads, case.width), (S, case.kv_heads, case.width), (S, case.kv_heads, values)
    operands = tuple(_normal(random, ROWS, *shape) for shape in shapes)
    return operands, mask, extras, _normal(random, ROWS, T, case.heads, values)
