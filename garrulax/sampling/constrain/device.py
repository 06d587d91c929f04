"""A regular expression as a transform: the automaton is followed on the device, inside of the decoding loop.

Letters: B rows, S states, V ids, N bytes of the longest token that is ever allowed.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.models.unpack import TokenizerLike
from garrulax.sampling.constrain.automaton import MEMORY, NEVER, TokenTable, token_table
from garrulax.sampling.constrain.vocabulary import vocabulary
from garrulax.sampling.transforms import Transform


def regex_transform(
    pattern: str, tokenizer: TokenizerLike, vocab: int, ends: Sequence[int], *, memory: int = MEMORY
) -> Transform:
    """Keeps the tokens with which a text goes on to match a regular expression, and ends it within its limit.

    The same texts as under `regex`, without a step of the host between two tokens. The transform reads the reserved
    knob `limit`, the greatest number of new tokens of a row. A row whose limit is less than `shortest_match` gets the
    beginning of a shortest text.

    The table has one byte a state and id (two if some text needs more than 254 tokens), and is a constant of the
    compiled program: 10 states over 50,000 ids are 0.5 MB.

    Args:
        pattern: The regular expression, in the syntax that `constrain.syntax` lists.
        tokenizer: The tokenizer of the model.
        vocab: Number of the model's ids, V.
        ends: Ids that end a text.
        memory: Greatest number of bytes of the table while it is made: two a state and id.

    Returns:
        The transform; the same object for equal arguments.

    Raises:
        ValueError: A syntax error, something that is not supported, a table that is too large, or no text can be
            written.
    """
    return _transform(pattern, cast(Any, tokenizer), vocab, tuple(ends), memory)


def shortest_match(pattern: str, tokenizer: TokenizerLike, vocab: int, ends: Sequence[int]) -> int:
    """Number of tokens of the shortest text that matches, the end token included; raises as `regex_transform`."""
    return int(_table(pattern, tokenizer, vocab, tuple(ends), MEMORY).needed[0])


def _table(pattern: str, tokenizer: Any, vocab: int, ends: tuple[int, ...], memory: int) -> TokenTable:
    try:
        return token_table(pattern, vocabulary(tokenizer, vocab, ends).texts, ends, memory)
    except NotImplementedError as error:
        raise ValueError(f"regex_transform: {error} is not supported: constrain=regex(...) may support it") from error
    except ValueError as error:
        raise ValueError(f"regex_transform: {error}") from error


@functools.lru_cache(maxsize=16)  # jit compares transforms by identity
def _transform(pattern: str, tokenizer: Any, vocab: int, ends: tuple[int, ...], memory: int) -> Transform:
    table = _table(pattern, tokenizer, vocab, ends, memory)
    after, content, sizes = _arrays(table)
    following = table.automaton.next  # int32 [S + 1, 256]
    needed = np.append(table.needed, 1).astype(np.int32)  # [S + 1]; in state S, after a wrong token, the text ends

    def init(knobs):
        limit = knobs["limit"].astype(jnp.int32)
        return {"state": jnp.zeros_like(limit), "left": limit}

    def update(logits, state):
        if logits.shape[-1] != vocab:
            raise ValueError(f"regex_transform: made for {vocab} ids, but the model has {logits.shape[-1]}")
        left = jnp.maximum(state["left"], jnp.asarray(needed)[state["state"]])  # [B]
        rows = jnp.asarray(after)[state["state"]].astype(jnp.int32)  # [B, V]
        allowed = rows < jnp.minimum(left, np.iinfo(after.dtype).max)[:, None]
        return jnp.where(allowed, logits, -jnp.inf), state

    def observe(token, state):
        def step(i, at):
            moved = jnp.asarray(following)[at, jnp.asarray(content)[token, i]]
            return jnp.where(i < jnp.asarray(sizes)[token], moved, at)

        at = jax.lax.fori_loop(0, content.shape[1], step, state["state"])
        return {"state": at, "left": state["left"] - 1}

    return Transform(init, update, observe)


def _arrays(table: TokenTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """after [S + 1, V], in which the greatest number of its dtype is never; bytes uint8 [V, N]; sizes int32 [V]."""
    finite = table.after[table.after < NEVER]
    dtype = np.uint8 if finite.max(initial=0) < 255 else np.uint16
    never = np.iinfo(dtype).max
    after = np.full((len(table.after) + 1, len(table.texts)), never, dtype)
    after[:-1] = np.minimum(table.after, never)
    after[-1, list(table.ends)] = 0
    used = np.any(table.after < NEVER, axis=0)
    texts = [text if use else b"" for text, use in zip(table.texts, used, strict=True)]
    length = max(1, *map(len, texts))
    content = np.array([np.frombuffer(text.ljust(length, b"\0"), np.uint8) for text in texts])
    return after, content, np.array([len(text) for text in texts], np.int32)
