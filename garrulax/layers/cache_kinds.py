"""The kinds of cache: which tokens are kept, in which slots, and at which positions a query finds them.

Letters: B rows, S slots, C width of a head.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from garrulax.core.config import Check, Count, Flag, Size, check_fields, check_value
from garrulax.core.dtypes import at_least_float32
from garrulax.kernels.mask import Band, Rule, Streams

ENTRIES = ("key", "value", "key_scale", "value_scale")  # the arrays with an entry for each token
OF_WINDOW = "window_"  # the beginning of the names of arrays of layers with a window, where only some have one
PASS = 128  # tokens that a ring has space for beyond those it keeps, and so the most that one pass reads

_DTYPE = Check(lambda x: x in (None, "int8"), "None (that of the parameters) or 'int8'")


class View(NamedTuple):
    """The keys among which one query of each row chooses, with positions counted in the cache.

    Attributes:
        query: int32 [B], position of the query.
        key: int32 [B, S'], position of each key; -1 where the query must not attend to it.
    """

    query: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Kind:
    """Base class of the kinds of cache. A kind is frozen, because it is a static argument of compiled programs.

    Attributes:
        dtype: Of the stored keys and values: None is that of the parameters, "int8" has a scale for each token and
            head.
    """

    dtype: str | None = dataclasses.field(default=None, kw_only=True)

    name: ClassVar[str] = ""
    ring: ClassVar[bool] = False  # whether new tokens take the slots of the oldest ones

    def __post_init__(self):
        check_fields(self)
        check_value("dtype", self.dtype, _DTYPE)

    @property
    def room(self) -> int | None:
        """Number of positions where they are counted in the cache; None where tokens keep those of their text."""
        return None

    @property
    def longest_pass(self) -> int | None:
        """Greatest number of tokens that one pass may read; None for any."""
        return None

    @property
    def on_host(self) -> tuple[str, ...]:
        """Names of the arrays that are kept in the memory of the host."""
        return ()

    def slots(self, needed: int) -> int:
        """Number of slots of a cache for texts of up to `needed` tokens."""
        return needed

    def slot(self, number: jax.Array, size: int) -> jax.Array:
        """The slot, of `size`, in which the token of each number is kept."""
        return number

    def narrow(self, rule: Rule) -> Rule:
        """The rule of a mask, without the tokens that this kind does not keep."""
        return rule

    def saves(self, needed: int) -> bool:
        """Whether it keeps less than a full cache of texts of up to `needed` tokens."""
        return self.slots(needed) < needed

    def reusable(self, known: int, read: int) -> int:
        """Number of the first `known` tokens that remain usable when a row of `read` tokens is shortened to them.

        A ring has lost what a shorter row would need, if it was shortened by more than the slots that it has beyond the
        window.
        """
        return known

    def of_layer(self, layer: int) -> tuple[str, "Kind"]:
        """The beginning of the names of a layer's arrays, and the kind of its cache."""
        return "", self

    def arrays(self, size: int, head_dim: int, dtype: Any) -> dict[str, tuple[int, int, Any]]:
        """The arrays of a head of a layer: name -> (length, width, dtype)."""
        if self.dtype is None:
            return dict.fromkeys(("key", "value"), (size, head_dim, dtype))
        scales = {f"{name}_scale": (size, 1, jnp.float32) for name in ("key", "value")}
        return dict.fromkeys(("key", "value"), (size, head_dim, jnp.int8)) | scales


@dataclasses.dataclass(frozen=True)
class Full(Kind):
    """Every token is kept; token t is in slot t."""

    name: ClassVar[str] = "full"


class Ring(Kind):
    """Base class of the kinds in which new tokens take the slots of the oldest ones; `chunk` is a field of each."""

    ring: ClassVar[bool] = True
    chunk: int

    @property
    def longest_pass(self) -> int:
        return self.chunk

    def reusable(self, known: int, read: int) -> int:
        return known if read <= self.slots(read) or read - known < self.chunk else 0


@dataclasses.dataclass(frozen=True)
class Window(Ring):
    """The last `size` tokens are kept, at their own positions, in a ring of slots.

    Attributes:
        size: Number of tokens that a query attends to, itself included.
        chunk: Slots beyond these, and so the greatest number of tokens of one pass.
    """

    size: Size
    chunk: Size = PASS

    name: ClassVar[str] = "window"

    def slots(self, needed: int) -> int:
        return self.size + self.chunk

    def slot(self, number: jax.Array, size: int) -> jax.Array:
        return number % size

    def narrow(self, rule: Rule) -> Rule:
        return rule & Band("rank", 0, self.size - 1)


@dataclasses.dataclass(frozen=True)
class LayerWindows(Kind):
    """A window in some layers; in the others every token is kept, and token t is in slot t.

    Attributes:
        window: The window.
        windowed: Whether each layer has the window; some have it and some do not.
    """

    window: Window
    windowed: tuple[bool, ...]

    name: ClassVar[str] = "windows in some layers"

    def __post_init__(self):
        super().__post_init__()
        if self.window.dtype != self.dtype:
            raise ValueError(f"the window has dtype={self.window.dtype!r}, and the other layers {self.dtype!r}")

    @property
    def longest_pass(self) -> int:
        return self.window.chunk

    @property
    def places(self) -> tuple[int, ...]:
        """Number of each layer among the layers of its kind."""
        return tuple(self.windowed[:i].count(one) for i, one in enumerate(self.windowed))

    def of_layer(self, layer: int) -> tuple[str, Kind]:
        return (OF_WINDOW, self.window) if self.windowed[layer] else ("", self)

    def slots(self, needed: int) -> int:
        """Whole passes, since the last one is padded."""
        return -(-needed // self.longest_pass) * self.longest_pass

    def saves(self, needed: int) -> bool:
        return self.window.saves(needed)

    def reusable(self, known: int, read: int) -> int:
        return self.window.reusable(known, read)


@dataclasses.dataclass(frozen=True)
class Sinks(Ring):
    """StreamingLLM: the first tokens and the last `size` ones, at positions counted in the cache.

    Source: Xiao et al. 2023, arXiv 2309.17453, section 3.2. Keys are stored before the rotary embedding.

    Attributes:
        first: Number of first tokens, the attention sinks.
        size: Number of last tokens that a query attends to, itself included.
        chunk: As of `Window`.
    """

    first: Size
    size: Size
    chunk: Size = PASS

    name: ClassVar[str] = "sinks"

    @property
    def room(self) -> int:
        return self.first + self.size

    def slots(self, needed: int) -> int:
        return self.room + self.chunk

    def slot(self, number: jax.Array, size: int) -> jax.Array:
        return jnp.where(number < self.first, number, self.first + (number - self.first) % (size - self.first))

    def keeps_whole(self, number: jax.Array) -> jax.Array:
        """Whether the token of each number attends to all tokens before it."""
        return number < self.room

    def view(self, number: jax.Array, streams: Streams) -> View:
        """The positions of all slots for the query of each row, whose token has this number [B]."""
        token = streams["rank"]  # int32 [B, S], number of the token in each slot
        query = jnp.minimum(number, self.room - 1)
        evicted = (number - query)[:, None]
        sink = token < self.first
        kept = (streams["segment"] >= 0) & (token <= number[:, None])
        kept = kept & (sink | (token > number[:, None] - self.size))
        return View(query, jnp.where(kept, jnp.where(sink, token, token - evicted), -1))


@dataclasses.dataclass(frozen=True)
class Blocks(Kind):
    """InfLLM: the first tokens, a local window, and of what lies between them the blocks that a query asks for.

    Source: Xiao et al. 2024, arXiv 2402.04617, section 3. Every token is kept. Keys are stored before the rotary
    embedding, and those that a query attends to have the positions 0, 1, 2, ... in the order of the text.

    Attributes:
        size: Tokens of a block.
        top: Number of blocks that each query and key/value head looks up.
        first: Number of first tokens that every query attends to.
        local: Least number of last tokens that every query attends to: a multiple of `size`.
        representatives: Number of keys of a block with which a query is compared.
        chunk: Greatest number of tokens of one pass.
        offload: Whether keys and values are kept in the memory of the host; scales of int8 stay on the device.
    """

    size: Size = 128
    top: Size = 16
    first: Count = 128
    local: Size = 4096
    representatives: Size = 4
    chunk: Size = PASS
    offload: Flag = dataclasses.field(default=False, kw_only=True)

    name: ClassVar[str] = "blocks"

    def __post_init__(self):
        super().__post_init__()
        if self.local % self.size:
            raise ValueError(f"blocks: local={self.local} must be a multiple of the size {self.size} of a block")
        if self.representatives > self.size:
            raise ValueError(f"blocks: {self.representatives} representatives are more than the {self.size} of a block")

    @property
    def room(self) -> int:
        return self.first + self.top * self.size + self.near

    @property
    def near(self) -> int:
        """Greatest number of local tokens: a block stays among them until it is complete and outside the window."""
        return self.local + self.size - 1

    @property
    def longest_pass(self) -> int:
        return self.chunk

    @property
    def on_host(self) -> tuple[str, ...]:
        # Not the scales of int8, whose last axis of 1 a TPU fills up to 128 in the memory of the host.
        return ("key", "value") if self.offload else ()

    def slots(self, needed: int) -> int:
        """Whole passes, since the last one is padded."""
        return -(-needed // self.chunk) * self.chunk

    def reusable(self, known: int, read: int) -> int:
        """Down to a whole block, since the sum of a block's queries is known as a whole only."""
        if known == read or known <= self.first:
            return known
        return known - (known - self.first) % self.size

    def keeps_whole(self, number: jax.Array) -> jax.Array:
        """Whether the token of each number attends to all tokens before it."""
        return self.outside(number) <= self.top

    def count(self, size: int) -> int:
        """Number of blocks of a cache of `size` slots."""
        return max(1, -(-(size - self.first) // self.size))

    def outside(self, number: jax.Array) -> jax.Array:
        """Number of blocks that lie before the local window of the token of each number."""
        return jnp.maximum((number + 1 - self.local - self.first) // self.size, 0)

    def arrays(self, size: int, head_dim: int, dtype: Any) -> dict[str, tuple[int, int, Any]]:
        count = self.count(size)
        more = {"queries": count, "representative": count * self.representatives}
        sums = {name: (length, head_dim, at_least_float32(dtype)) for name, length in more.items()}
        return super().arrays(size, head_dim, dtype) | sums

    def view(self, number: jax.Array) -> View:
        """The positions of the slots that `block_memory.look_up` finds, for the token of each number [B]."""
        outside = self.outside(number)
        looked_up = jnp.minimum(outside, self.top)
        start = self.first + outside * self.size  # of the local tokens
        left_out = (outside - looked_up) * self.size
        b, s, n = (x[:, None] for x in (looked_up, start, number))
        first, middle, near = (jnp.arange(x, dtype=jnp.int32)[None] for x in self.parts)
        parts = (
            jnp.where(first <= n, first, -1),
            jnp.where(middle < b * self.size, self.first + middle, -1),
            jnp.where(s + near <= n, s + near - left_out[:, None], -1),
        )
        return View(number - left_out, jnp.concatenate(parts, axis=1))

    @property
    def parts(self) -> tuple[int, int, int]:
        """Numbers of slots of first tokens, of looked up blocks and of local tokens in a view."""
        return self.first, self.top * self.size, self.near


FULL = Full()
