"""The masks shown in docs/attention.md, for any number of tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels import masks
from garrulax.kernels.mask import PAD, Mask


def cut(length: int, *eighths: int) -> np.ndarray:
    """[T] numbers 0, 1, 2, ...: the row is cut at these eighths of its length, and PAD follows the last cut."""
    part = np.searchsorted(np.array(eighths) * length // 8, np.arange(length), side="right")
    return np.where(part == len(eighths), PAD, part)


def documents(length: int) -> jax.Array:
    """Segments [1, T] of a packed row: three documents of 3/8, 1/8 and 3/8 of the row, then padding."""
    return jnp.asarray(cut(length, 3, 4, 7)[None])


def one(length: int) -> jax.Array:
    """Segments [1, T] of a row that is one document."""
    return jnp.zeros((1, length), jnp.int32)


def infilling(length: int) -> Mask:
    """Part A is the first 2/3 of each long document; the short one has no part A."""
    part = cut(length, 2, 3, 4, 6, 7)
    return masks.infilling(documents(length), jnp.asarray(((part == 0) | (part == 3))[None]))


def tree(length: int) -> Mask:
    """A tree of drafts, with two or three children each, in the last slots of a cache that is not full."""
    nodes = min(length // 4, 90)
    parents = [(i - 1) // 3 if i % 3 else max(i - 4, -1) for i in range(nodes)]
    used, first = length * 5 // 8, length - nodes
    slots = [masks.COMMITTED if i < used else masks.EMPTY if i < first else i - first for i in range(length)]
    return masks.tree(parents, jnp.array([slots]))


#: Name of the builder -> mask of T tokens, or a tuple of masks for as many groups of heads.
MASKS = {
    "causal": lambda T: masks.causal(1, T),
    "padded": lambda T: masks.padded(jnp.arange(T)[None] >= T // 6),
    "packed": lambda T: masks.packed(documents(T)),
    "bidirectional": lambda T: masks.bidirectional(documents(T)),
    "prefix": lambda T: masks.prefix(jnp.array([T // 3]), T),
    "infilling": infilling,
    "choices": lambda T: masks.choices(jnp.asarray(cut(T, 4, 5, 6, 7)[None])),
    "window": lambda T: masks.window(documents(T), T // 6),
    "strided": lambda T: masks.strided(one(T), T // 12, T // 12),
    "fixed": lambda T: masks.fixed(one(T), T // 6, T // 48),
    "sinks_and_window": lambda T: masks.sinks_and_window(one(T), T // 24, T // 5),
    "bigbird": lambda T: masks.bigbird(one(T), jax.random.key(2), block=T // 12, random=2),
    "shifted": lambda T: masks.shifted(one(T), T // 4),
    "tree": tree,
}
