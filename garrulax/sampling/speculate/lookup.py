"""Prompt lookup: drafts are what followed the last tokens earlier in the text. Letters: L length of the text."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core.config import ModelConfig
from garrulax.kernels.mask import PAD
from garrulax.sampling.requests import Weights
from garrulax.sampling.speculate.accept import exact
from garrulax.sampling.speculate.interface import Bound, Outcome, Proposal, Proposer, Speculation, check_parents
from garrulax.sampling.state import Requests, State
from garrulax.sampling.transforms import Transform

LEAST = 2  # tokens of a match that is worth a pass over all drafts
WORTH = 0.5  # how often the first draft must have been right lately
RECENT = 0.25  # weight of the newest one in this average


@dataclasses.dataclass(frozen=True)
class PromptLookup(Speculation):
    """The argument `speculate` that `prompt_lookup` makes.

    Attributes:
        ngram: Greatest number of tokens that are compared.
        tokens: Greatest number of drafts in a pass.
    """

    ngram: int
    tokens: int

    def bind(self, weights: Weights, config: ModelConfig, transform: Transform, requests: Requests, size: int) -> Bound:
        """See `Speculation.bind`."""
        prompt = _to_the_right(np.asarray(requests.prompt))

        def begin(state: State) -> dict[str, jax.Array]:
            rows = len(state.done)
            padded = np.pad(prompt, ((0, rows - len(prompt)), (0, 0)), constant_values=PAD)
            rate, first = jnp.ones((rows,), jnp.float32), jnp.full((rows,), PAD, jnp.int32)
            return {"prompt": jnp.asarray(padded), "rate": rate, "first": first}

        return Bound(_proposer(self.ngram, self.tokens), (), begin)


def prompt_lookup(ngram: int = 3, tokens: int = 10) -> PromptLookup:
    """Speculation with drafts from the text itself: what followed its last tokens when they occurred before.

    No second model is needed (Saxena 2023, "Prompt Lookup Decoding"). It makes texts faster that repeat parts of the
    prompt or of themselves, such as edited code, summaries and JSON. The completion is that without it.

    The longest of the last `ngram`, ..., 1 tokens that occurred before is taken, where it occurred last. All `tokens`
    drafts are read if at least two tokens were found and drafts have been right lately. Otherwise an ordinary step is
    made, of which a single prompt also gets the first draft checked.

    Args:
        ngram: Greatest number of last tokens that are looked up.
        tokens: Greatest number of drafts in a pass.

    Raises:
        ValueError: A number below 1, or more than 89 drafts.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> one = gx.generate(model, [5, 17, 3], max_new_tokens=30, temperature=0, speculate=gx.prompt_lookup())
        >>> one.tokens == gx.generate(model, [5, 17, 3], max_new_tokens=30, temperature=0).tokens
        True
        >>> one.passes < 30
        True
    """
    for name, value in (("ngram", ngram), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"prompt_lookup: {name}={value!r} must be a whole number of at least 1")
    check_parents(tuple(range(-1, tokens - 1)))
    return PromptLookup(ngram, tokens)


@functools.cache  # jit compares proposers by identity
def _proposer(ngram: int, count: int) -> Proposer:
    def propose(params: Any, memory: dict[str, jax.Array], state: State) -> tuple[Proposal, dict[str, jax.Array]]:
        prompt = memory["prompt"]
        end = prompt.shape[1] + state.generated  # [B]
        text = jnp.concatenate([prompt, state.tokens], axis=1)  # [B, L]; a row's text ends before `end`
        tokens, found = lookup(text, end, ngram, count)
        valid = jnp.broadcast_to((found > 0)[:, None], tokens.shape)
        worth = (found >= min(LEAST, ngram)) & (memory["rate"] >= WORTH)
        return Proposal(tokens, valid, worth), {**memory, "first": jnp.where(found > 0, tokens[:, 0], PAD)}

    def observe(params: Any, memory: dict[str, jax.Array], outcome: Outcome) -> dict[str, jax.Array]:
        first, rate = memory["first"], memory["rate"]
        column = jnp.minimum(outcome.before.generated, outcome.after.tokens.shape[1] - 1)
        sampled = jnp.take_along_axis(outcome.after.tokens, column[:, None], axis=1)[:, 0]
        right = (sampled == first).astype(jnp.float32)
        proposed = (first != PAD) & ~outcome.before.done
        return {**memory, "rate": jnp.where(proposed, rate + RECENT * (right - rate), rate)}

    return Proposer(tuple(range(-1, count - 1)), propose, observe, exact)


def lookup(text: jax.Array, end: jax.Array, ngram: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Finds the tokens that followed an earlier occurrence of the last tokens of a text.

    Args:
        text: int32 [B, L], negative for no token; what lies from `end` on is not read.
        end: int32 [B], index after the last token.
        ngram: Greatest number of last tokens to look up.
        count: Number of tokens to return, N.

    Returns:
        int32 [B, N]; if the text ends before, it is taken to go on periodically. And the number of tokens that were
        found, int32 [B]; 0 is none.
    """
    index = jnp.arange(text.shape[1], dtype=jnp.int32)[None]  # [1, L]
    same = index < (end - 1)[:, None]  # the match may end at any token but the last
    length = jnp.zeros_like(text)
    for back in range(ngram):  # `same`: the tokens up to `back` before are those at the end
        last = jnp.take_along_axis(text, jnp.maximum(end - 1 - back, 0)[:, None], axis=1)  # [B, 1]
        same = same & (jnp.roll(text, back, axis=1) == last) & (last >= 0) & (index >= back)
        length = length + same.astype(jnp.int32)
    found = length.max(axis=1)
    place = jnp.where((length == found[:, None]) & (found > 0)[:, None], index, -1).max(axis=1)  # [B], the last one
    period = jnp.maximum(end - 1 - place, 1)
    places = place[:, None] + 1 + jnp.arange(count, dtype=jnp.int32)[None] % period[:, None]
    tokens = jnp.take_along_axis(text, jnp.clip(places, 0, text.shape[1] - 1), axis=1)
    return jnp.where((found > 0)[:, None], tokens, 0), found


def _to_the_right(prompt: np.ndarray) -> np.ndarray:
    """int32 [B, P] whose tokens are on the left, with the tokens on the right."""
    moved = np.full_like(prompt, PAD)
    for to, ids in zip(moved, prompt, strict=True):
        kept = ids[ids != PAD]
        to[len(to) - len(kept) :] = kept
    return moved
