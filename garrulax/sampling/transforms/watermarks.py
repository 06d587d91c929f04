"""Watermarks: a choice of tokens that a key makes, and that a test on the text finds. Letters: B rows, V vocabulary.

Each token t has a pseudorandom number r after each context, which is a function of the key, the last h tokens and t:

    k = the key, two words of 32 bits, the upper one first
    k = threefry2x32(k, (0, c))    for each of the last h tokens c, from the earliest to the latest
    r = the first word of threefry2x32(k, (0, t))

threefry2x32 has 20 rounds (Salmon et al. 2011). Generation and detection use the same functions. docs/watermarks.md
shows their use.
"""

import dataclasses
import functools
import hashlib
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.sampling.transforms.base import Transform, argmax, only_if, token_ids
from garrulax.sampling.transforms.sequences import add_token, after_same_tokens, text_so_far

SCHEMES = ("green", "gumbel")
GREEN, GUMBEL = 1, 2  # numbers of the schemes on the device; 0 is none
LONGEST_CONTEXT = 8
GAMMA, DELTA = 0.25, 2.0  # of green lists, by default


@dataclasses.dataclass(frozen=True)
class Watermark:
    """A watermark, for the argument `watermark` of `generate` and for `detect_watermark`; `watermark` makes it.

    Attributes:
        key: Integer of 64 bits.
        scheme: "green" or "gumbel".
        gamma: Probability of a token to be green.
        delta: Number that is added to the logits of green tokens.
        context: h, the number of tokens on which the choice of the next one depends.

    Example:
        >>> import garrulax as gx
        >>> isinstance(gx.watermark("a secret"), gx.Watermark)
        True
    """

    key: int
    scheme: str
    gamma: float
    delta: float
    context: int

    @property
    def words(self) -> tuple[int, int]:
        """The two words of 32 bits of the key, the upper one first."""
        return self.key >> 32, self.key & 0xFFFFFFFF

    @property
    def threshold(self) -> int:
        """A token is green if its number r is smaller than this."""
        return round(self.gamma * 2**32)


def watermark(
    key: int | str,
    scheme: str = "green",
    *,
    gamma: float | None = None,
    delta: float | None = None,
    context: int = 4,
) -> Watermark:
    """A watermark: `gx.generate(model, prompts, watermark=gx.watermark("a secret"))`.

    "green" adds `delta` to the logits of the tokens that are green after the last tokens (Kirchenbauer et al. 2023,
    arXiv 2301.10226). "gumbel" takes the random numbers of sampling from the key and the last tokens in place of the
    seed (Aaronson 2022), so that over keys each text has the probability that it has without a watermark.

    Args:
        key: The secret: a text, of which the first 64 bits of its SHA-256 are taken, or an integer of up to 64 bits.
        scheme: "green" or "gumbel".
        gamma: For green lists: the probability of a token to be green, above 0 and below 1; None is 0.25.
        delta: For green lists: the number that is added, above 0; None is 2.
        context: Number of tokens on which the choice of the next one depends, from 1 to 8. Fewer survive more edits of
            the text; more repeat themselves less and are harder to guess.

    Returns:
        A description, for the argument `watermark` of `generate` and for `detect_watermark`.

    Raises:
        TypeError: The key is neither a text nor an integer.
        ValueError: A bad argument.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model, mark = (gx.init(config, jax.random.key(0)), config), gx.watermark("a secret")
        >>> done = gx.generate(model, [5, 17, 3, 9], max_new_tokens=60, watermark=mark)
        >>> gx.detect_watermark(done.tokens, mark).z > 4 > gx.detect_watermark(done.tokens, gx.watermark("other")).z
        True
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r:.40} must be 'green' or 'gumbel'")
    unread = [name for name, value in (("gamma", gamma), ("delta", delta)) if value is not None]
    if unread and scheme == "gumbel":
        raise ValueError(f"{unread[0]} is for green lists: leave it out, or scheme='gumbel'")
    share = _number("gamma", GAMMA if gamma is None else gamma)
    bonus = _number("delta", DELTA if delta is None else delta)
    if not 0 < share < 1 or not 0 < round(share * 2**32) < 2**32:
        raise ValueError(f"gamma={gamma} must be above 0 and below 1")
    if not 0 < bonus < math.inf:
        raise ValueError(f"delta={delta} must be above 0 and finite")
    if isinstance(context, bool) or not hasattr(context, "__index__") or not 1 <= context <= LONGEST_CONTEXT:
        raise ValueError(f"context={context!r:.40} must be a whole number from 1 to {LONGEST_CONTEXT}")
    return Watermark(_key(key), scheme, share, bonus, operator.index(context))


def _key(key: Any) -> int:
    if isinstance(key, str) and key:
        return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    if isinstance(key, str | bool) or not hasattr(key, "__index__"):
        raise TypeError(f"the key of a watermark must be a text that is not empty, or an integer, not {key!r:.40}")
    if not 0 <= operator.index(key) < 2**64:
        raise ValueError(
            "an integer as the key of a watermark must be from 0 to 2**64 - 1: a text may be of any length"
        )
    return operator.index(key)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r:.40} must be a number") from None


class Marks(NamedTuple):
    """The watermarks of rows, as arrays.

    Attributes:
        scheme: int32 [B], 0 for no watermark.
        key: uint32 [B, 2].
        context: int32 [B].
        threshold: uint32 [B].
        delta: float32 [B].
    """

    scheme: Any
    key: Any
    context: Any
    threshold: Any
    delta: Any


def as_arrays(marks: Sequence[Watermark | None]) -> Marks:
    """The watermarks of rows, None for no watermark, as NumPy arrays."""
    some = [mark or Watermark(0, "", 0.5, 1.0, 1) for mark in marks]
    numbers = {"": 0, "green": GREEN, "gumbel": GUMBEL}
    return Marks(
        np.array([numbers[mark.scheme] for mark in some], np.int32),
        np.array([mark.words for mark in some], np.uint32).reshape(-1, 2),
        np.array([mark.context for mark in some], np.int32),
        np.array([mark.threshold for mark in some], np.uint32),
        np.array([mark.delta for mark in some], np.float32),
    )


def fold(key: jax.Array, number: jax.Array) -> jax.Array:
    """threefry2x32(key, (0, number)): uint32 [2] and int32 [] to uint32 [2]."""
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), number))


def context_keys(key: jax.Array, recent: jax.Array, context: jax.Array) -> jax.Array:
    """The key after the last tokens of each row.

    Args:
        key: uint32 [B, 2], the keys of the watermarks.
        recent: int32 [B, LONGEST_CONTEXT], the last tokens; those before the last `context` ones do not matter.
        context: int32 [B].

    Returns:
        uint32 [B, 2].
    """

    def fold_token(i, keys):
        in_context = i >= LONGEST_CONTEXT - context
        return jnp.where(in_context[:, None], jax.vmap(fold)(keys, recent[:, i]), keys)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(LONGEST_CONTEXT), fold_token, key)


def gumbel_noise(numbers: jax.Array) -> jax.Array:
    """Gumbel noise -log(-log(u)) of uint32 numbers r, u = 1 - (r + 1/2) / 2**32: float32 of the same shape.

    1 - u is rounded, not u: the greatest noise, which decides, is the most precise.
    """
    rest = jnp.minimum((numbers.astype(jnp.float32) + 0.5) * 2**-32, 1 - 2**-24)
    return -jnp.log(-jnp.log1p(-rest))


@functools.cache
def watermarking() -> Transform:
    """Marks the text by the knob `watermark` (`Marks`); it stands last in a chain.

    Green lists add delta to the logits of green tokens. The Gumbel scheme adds noise to the logits, and keeps only the
    greatest. It leaves the logits of a row as they are, so that the token is sampled by the seed, after a context that
    was in the row before: the same noise again would make the text repeat itself. Neither marks a token before which
    the row has fewer tokens than the context needs.

    The state has the text, int32 [B, N] for a greatest length N, and its length.
    """

    def init(knobs):
        return knobs["watermark"], *text_so_far(knobs)

    def mark(logits, marks, text, length):
        index = length[:, None] + np.arange(-LONGEST_CONTEXT, 0, dtype=np.int32)[None]
        recent = jnp.take_along_axis(text, jnp.maximum(index, 0), axis=1)
        keys = context_keys(marks.key, recent, marks.context)
        ids = token_ids(logits)[0]
        numbers = jax.vmap(lambda key: jax.vmap(functools.partial(fold, key))(ids)[:, 0])(keys)  # [B, V]
        known = length >= marks.context

        def choose(logits, numbers):
            is_new = ~jnp.any(after_same_tokens(text, length, marks.context + 1), axis=1)
            choice = argmax(logits + gumbel_noise(numbers).astype(logits.dtype))
            chosen = token_ids(logits) == choice[:, None]
            return jnp.where(chosen | ~(known & is_new & (marks.scheme == GUMBEL))[:, None], logits, -jnp.inf)

        is_green = (numbers < marks.threshold[:, None]) & (known & (marks.scheme == GREEN))[:, None]
        logits = logits + jnp.where(is_green, marks.delta[:, None], 0).astype(logits.dtype)
        return only_if(marks.scheme == GUMBEL, choose, logits, numbers)

    def update(logits, state):
        return only_if(state[0].scheme > 0, mark, logits, *state), state

    def observe(token, state):
        marks, text, length = state
        return marks, *add_token(token, text, length)

    return Transform(init, update, observe)
