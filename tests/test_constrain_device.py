"""`regex_transform` follows a regular expression on the device as the matcher on the host does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.sampling import constrain

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENIZER = ByteTokenizer()
V, ENDS = 270, (256, 257)


def test_masks_are_those_of_the_host():
    pattern = r"(\d{2}é|[a-c]+x)!?"
    transform = constrain.regex_transform(pattern, TOKENIZER, V, ENDS)
    assert transform is constrain.regex_transform(pattern, TOKENIZER, V, ENDS)
    shortest = constrain.shortest_match(pattern, TOKENIZER, V, ENDS)
    grammar = constrain.regex(pattern).bind(TOKENIZER, V, ENDS)
    assert shortest == grammar.shortest == 3
    limits = [3, 4, 5, 9, 40]
    step = jax.jit(lambda token, state: transform.update(zeros, transform.observe(token, state)))
    zeros = jnp.zeros((len(limits), V), jnp.float32)
    logits, state = transform.update(zeros, transform.init({"limit": jnp.asarray(limits, jnp.int32)}))
    rng, matchers = np.random.default_rng(0), [grammar.matcher(limit) for limit in limits]
    texts = [b""] * len(limits)
    while not all(matcher.finished for matcher in matchers):
        tokens = []
        for row, matcher in enumerate(matchers):
            bits = np.zeros(-(-V // 32), np.uint32)
            matcher.mask(bits)
            allowed = grammar.vocabulary.ids(bits)
            if not matcher.finished:
                assert np.array_equal(np.flatnonzero(np.isfinite(logits[row])), allowed)
                tokens.append(int(rng.choice(allowed)))
                assert matcher.accept(tokens[-1])
                texts[row] += TOKENIZER.token_bytes(tokens[-1])
            else:
                tokens.append(ENDS[0])
        logits, state = step(jnp.asarray(tokens, jnp.int32), state)
    assert all(re.fullmatch(pattern, text.decode()) for text in texts)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="regex_transform: lookahead is not supported"):
        constrain.regex_transform("(?=a)b", TOKENIZER, V, ENDS)
    with pytest.raises(
        ValueError, match=r"regex_transform: a table of 2 MB \(\d+ states, 270 tokens\), more than 0 MB"
    ):
        constrain.regex_transform("a{1000}" * 4, TOKENIZER, V, ENDS, memory=2**20 - 1)
    transform = constrain.regex_transform("a", TOKENIZER, V, ENDS)
    state = transform.init({"limit": jnp.ones(1, jnp.int32)})
    with pytest.raises(ValueError, match="made for 270 ids, but the model has 300"):
        transform.update(jnp.zeros((1, 300)), state)
