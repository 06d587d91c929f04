"""Transforms that look for sequences of tokens in the text so far. Letters: B rows, V vocabulary, N greatest length."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.sampling.transforms.base import Knobs, Transform, only_if
from garrulax.sampling.transforms.tokens import add, forbid


def prompt_length(knobs: Knobs) -> jax.Array:
    """Number of tokens of each row's prompt: int32 [B]."""
    return jnp.sum(knobs["prompt"] >= 0, axis=-1, dtype=jnp.int32)


def text_so_far(knobs: Knobs) -> tuple[jax.Array, jax.Array]:
    """The prompt of each row with space for its new tokens, int32 [B, N], and its length, int32 [B].

    Only of texts without an end (`gx.sinks`) there may be more tokens: then it is the last N.
    """
    prompt, size = knobs["prompt"], knobs["size"]
    text = jnp.pad(prompt[:, :size], ((0, 0), (0, max(0, size - prompt.shape[1]))), constant_values=-1)
    return text, prompt_length(knobs)


def add_token(token: jax.Array, text: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The text and its length after one more token, int32 [B]. A text without space for it loses its first token."""
    rows, most = jnp.arange(token.shape[0], dtype=jnp.int32), text.shape[1]
    full = length >= most
    text = jax.lax.cond(full.any(), lambda: jnp.where(full[:, None], jnp.roll(text, -1, axis=1), text), lambda: text)
    return text.at[rows, jnp.minimum(length, most - 1)].set(token), jnp.minimum(length + 1, most)


def after_same_tokens(text: jax.Array, length: jax.Array, n: jax.Array) -> jax.Array:
    """Which tokens of a text follow n - 1 tokens that equal its last n - 1 tokens.

    Args:
        text: int32 [B, N].
        length: int32 [B].
        n: int32 [B]; 0 is none.

    Returns:
        bool [B, N].
    """
    slots = jnp.arange(text.shape[1], dtype=jnp.int32)[None]  # [1, N]
    follows = (slots < length[:, None]) & (n > 0)[:, None]

    # In round k, `follows` says whether the k - 1 tokens before a slot are the last k - 1 tokens of the text.
    def unfinished(carry):
        k, follows = carry
        return (k < jnp.max(n)) & jnp.any(follows)

    def compare(carry):
        k, follows = carry
        last = jnp.take_along_axis(text, jnp.maximum(length - k, 0)[:, None], axis=1)  # [B, 1]
        same = (jnp.roll(text, k, axis=1) == last) & (slots >= k)
        return k + 1, follows & (same | (k >= n)[:, None])

    return jax.lax.while_loop(unfinished, compare, (jnp.int32(1), follows))[1]


@functools.cache
def no_repeat_ngram() -> Transform:
    """Removes each token that would make n tokens in a row which the text, prompt included, already has.

    The knob is `no_repeat_ngram_size` (int32 [B], n; Paulus et al. 2018), 0 is off. The state has the text, int32
    [B, N], and its length.
    """

    def init(knobs):
        return knobs["no_repeat_ngram_size"], *text_so_far(knobs)

    def ban(logits, n, text, length):
        return forbid(logits, jnp.where(after_same_tokens(text, length, n), text, -1))

    def update(logits, state):
        return only_if(state[0] > 0, ban, logits, *state), state

    def observe(token, state):
        n, text, length = state
        return n, *add_token(token, text, length)

    return Transform(init, update, observe)


@functools.cache
def bad_words() -> Transform:
    """Removes each token that would complete one of the sequences of the knob `bad_words_ids`.

    The knob is int32 [B, S, W]: S sequences of up to W ids, which end in the last column; negative for none. A sequence
    that is one end token alone is ignored, as in transformers. The state has the last W - 1 tokens of the text.
    """

    def init(knobs):
        words = knobs["bad_words_ids"]
        is_end = jnp.any(words[:, :, -1:] == knobs["ends"][:, None], axis=-1) & (words[:, :, -1] >= 0)  # [B, S]
        single = jnp.all(words[:, :, :-1] < 0, axis=-1)
        return jnp.where((is_end & single)[..., None], -1, words), _last_tokens(knobs, words.shape[-1] - 1)

    def update(logits, state):
        words, recent = state
        return forbid(logits, jnp.where(_matches(words, recent), words[:, :, -1], -1)), state

    return Transform(init, update, _remember)


@functools.cache
def sequence_bias() -> Transform:
    """Adds a number to the logit of each token that would complete a sequence.

    The knob `sequence_bias` is a pair: sequences as in `bad_words`, int32 [B, S, W], and numbers, float32 [B, S]. The
    state has the last W - 1 tokens of the text.
    """

    def init(knobs):
        words, bias = knobs["sequence_bias"]
        return (words, bias), _last_tokens(knobs, words.shape[-1] - 1)

    def update(logits, state):
        (words, bias), recent = state
        ids = jnp.where(_matches(words, recent), words[:, :, -1], -1)
        return add(logits, ids, bias), state

    return Transform(init, update, _remember)


def _last_tokens(knobs: Knobs, size: int) -> jax.Array:
    """The last tokens of each prompt, -2 where the prompt is shorter: int32 [B, size]."""
    prompt = jnp.pad(knobs["prompt"], ((0, 0), (size, 0)), constant_values=-2)
    slots = prompt_length(knobs)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    return jnp.take_along_axis(prompt, slots, axis=1)


def _remember(token: jax.Array, state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
    words, recent = state
    return words, jnp.concatenate([recent, token[:, None]], axis=1)[:, 1:]


def _matches(words: jax.Array, recent: jax.Array) -> jax.Array:
    """Whether the text ends in a sequence without its last token: [B, S, W] and [B, W - 1] to bool [B, S]."""
    beginning = words[:, :, :-1]
    return jnp.all((beginning < 0) | (beginning == recent[:, None]), axis=-1)
