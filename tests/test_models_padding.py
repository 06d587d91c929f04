"""Every decoder family against logits of the reference code: padded rows, and packed documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import arrays, config, params, relative_error
from registry import CAUSAL

import garrulax as gx
from garrulax.kernels import masks

LENGTHS = ("llama_dynamic", "llama_longrope")  # their angles depend on the length of the whole row
#: Learned positions with bands, rotary ones, ALiBi, rotary ones that depend on the length, two positions a token.
QUICK = ("gpt3", "gpt_neox_seq", "baichuan13b", "llama_dynamic", "chatglm2", "glm")
CONTRACT = 2e-6  # ten times tighter than promised: independent implementations agree to 1e-6
forward = jax.jit(gx.forward, static_argnums=2)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def padded_batch(rows, width, left, pad=0):
    """Rows of different lengths in one array, with which entries are tokens and the positions of those."""
    tokens, valid = np.full((len(rows), width), pad), np.zeros((len(rows), width), int)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, at], valid[i, at] = row, 1
    return jnp.asarray(tokens), jnp.asarray(valid), jnp.asarray(np.maximum(valid.cumsum(1) - 1, 0))


def some(names):
    """Parameters of a test: all of `names`, of which `make test` runs one for each kind of positions."""
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("case", some([case for case in CAUSAL if case != "llama_longrope"]))  # has a test of its own
@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_equal_unpadded_ones(case, left, table):
    """In one pass, and as prompts that go on in a cache, where shorter prompts leave gaps."""
    c, p = config(case), params(case)
    texts = np.asarray(arrays(case)["input_ids"])

    def alone(row, length):
        """The original's logits of the row; of a dynamic RoPE, which sees what comes later, ours of so many tokens."""
        if case != "llama_dynamic":
            return arrays(case)["logits"][row, :length]
        return forward(p, jnp.asarray(texts[:, :length]), c)[0][row]

    longest = texts.shape[1] - 3  # three more tokens follow below
    rows = [texts[0, :longest], texts[1, :4]]
    tokens, valid, positions = padded_batch(rows, longest, left)
    logits, _ = forward(p, tokens, c, mask=masks.padded(valid), positions=positions)
    for i, row in enumerate(rows):
        error = relative_error(logits[i][np.asarray(valid[i], bool)], alone(i, len(row)))
        table(CAUSAL[case], "padded", error)
        assert error <= CONTRACT

    cache = gx.cache_for(p, c, 2, texts.shape[1])
    lengths = np.array([len(row) for row in rows])
    cache = cache.replace(planned=jnp.asarray(lengths + 3))
    again, cache = forward(p, tokens, c, mask=masks.padded(valid), positions=positions, cache=cache)
    if case != "llama_dynamic":  # which plans a longer text here
        assert relative_error(again, logits) <= CONTRACT  # of padding too: it sees nothing, cached or not
    for step in range(3):
        new = jnp.asarray([[texts[i, lengths[i] + step]] for i in range(2)])
        logits, cache = forward(p, new, c, positions=jnp.asarray(lengths[:, None] + step), cache=cache)
        for i in range(2):
            assert relative_error(logits[i, 0], alone(i, lengths[i] + 3)[lengths[i] + step]) <= CONTRACT


@pytest.mark.parametrize("case", some([case for case in CAUSAL if case not in LENGTHS]))
def test_packed_documents_equal_separate_ones(case):
    c, p = config(case), params(case)
    text = np.asarray(arrays(case)["input_ids"])[0]
    cuts = [(0, 5), (5, 6), (6, len(text) - 1)]  # and the last token is padding
    segment = np.full(len(text), masks.PAD)
    positions = np.zeros(len(text), int)
    for number, (start, end) in enumerate(cuts):
        segment[start:end], positions[start:end] = number, range(end - start)
    logits, _ = forward(
        p, jnp.asarray(text[None]), c, mask=masks.packed(jnp.asarray(segment[None])), positions=positions[None]
    )
    for start, end in cuts:
        alone, _ = forward(p, jnp.asarray(text[None, start:end]), c)
        assert relative_error(logits[0, start:end], alone[0]) <= CONTRACT
