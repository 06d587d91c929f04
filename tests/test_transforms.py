"""Transforms of logits in one batch, each row with another one on; and docs/sampling.md.

tests/parity/test_transforms.py compares them with transformers over random knobs and texts.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from garrulax.sampling import knobs, transforms

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOGITS = np.array([2.0, 1.5, 1.5, 0.5, -1.0, 3.0, 0.0, -2.5, 1.0, -0.5, 2.5, -4.0])
V, EOS = LOGITS.size, 11
PROMPT, NEW = [5], [10, 5]
KEPT = {  # knob -> (value, ids that transformers 5.23 keeps of LOGITS after the tokens 5, 10, 5)
    "top_k": (3, [0, 5, 10]),
    "top_p": (0.75, [0, 2, 5, 10]),
    "min_p": (0.2, [0, 1, 2, 5, 10]),
    "top_h": (0.6, [0, 5, 10]),
    "typical_p": (0.5, [0, 1, 2, 10]),
    "epsilon_cutoff": (0.05, [0, 1, 2, 5, 10]),
    "eta_cutoff": (0.3, [0, 5, 10]),
    "no_repeat_ngram_size": (2, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]),
    "bad_words_ids": ([[5, 0], [10, 1], [3], [10, 5, 8], [EOS]], [1, 2, 4, 5, 6, 7, 9, 10, 11]),
    "temperature": (0, [5]),
    # by hand
    "allowed_tokens": ([3, 4], [3, 4]),
    "suppress_tokens": ([0, 11], [*range(1, 11)]),
    "begin_suppress_tokens": ([0, 11], [*range(12)]),
    "min_length": (4, [*range(11)]),
    "min_new_tokens": (2, [*range(12)]),
    "forced_bos_token_id": (3, [*range(12)]),
    "forced_eos_token_id": ([11], [11]),
}
CHANGED = {  # knob -> (value, what is added to logits)
    "repetition_penalty": (1.5, {5: -1.0, 10: 2.5 / 1.5 - 2.5}),  # transformers
    "sequence_bias": ({(5, 0): 2.0, (4,): 1.0, (10, 1): 9.0}, {0: 2.0, 4: 1.0}),
    "exponential_decay_length_penalty": ((0, 1.5), {11: 4 * (1.5**2 - 1)}),
    "frequency_penalty": (0.5, {5: -0.5, 10: -0.5}),  # the definition: counts among new tokens
    "presence_penalty": (0.25, {5: -0.25, 10: -0.25}),
    "logit_bias": ({2: -1.5, 7: 0.5}, {2: -1.5, 7: 0.5}),
}


def initial(transform, values, rows, prompts, size=16):
    """The state of a transform before the first new token."""
    arrays = knobs.knob_arrays(transform, knobs.knobs_per_prompt(rows, **values), rows)
    prompt = np.full((rows, max(map(len, prompts))), -1, np.int32)
    for row, tokens in zip(prompt, prompts, strict=True):
        row[: len(tokens)] = tokens
    reserved = {
        "prompt": prompt,
        "ends": np.array([[EOS, -1]] * rows, np.int32),
        "limit": np.full(rows, 3, np.int32),
        "unconditional": np.arange(rows) % 2 == 1,
    }
    return jax.jit(lambda k: transform.init({**k, "vocab": V, "size": size}))({**arrays, **reserved})


def test_each_row_has_its_own_transforms():
    cases = {**KEPT, **CHANGED}
    names = list(cases)
    values = {n: [None] * i + [cases[n][0]] + [None] * (len(names) - 1 - i) for i, n in enumerate(names)}
    chain = transforms.standard_chain(names)
    state = initial(chain, values, len(names), [PROMPT] * len(names))

    @jax.jit
    def run(logits, state):
        for token in NEW:
            state = chain.observe(jnp.full(len(names), token, jnp.int32), state)
        return chain.update(logits, state)

    logits, after = run(jnp.asarray(np.tile(LOGITS, (len(names), 1)), jnp.float32), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for row, name in zip(np.asarray(logits), names, strict=True):
        kept = KEPT[name][1] if name in KEPT else range(V)
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(row)), kept, err_msg=name)
        wanted = LOGITS.copy()
        for i, difference in CHANGED[name][1].items() if name in CHANGED else ():
            wanted[i] += difference
        if name in ("temperature", "forced_eos_token_id"):  # these leave one token, and make its logit 0
            wanted[kept] = 0
        np.testing.assert_allclose(row[kept], wanted[kept], atol=2e-6, err_msg=name)


def test_temperature_divides():
    """A transform after it sees the quotients; where these would overflow, the differences are right."""
    values = {"temperature": [0.5, 1e-30], "repetition_penalty": [2, 1]}
    chain = transforms.chain(transforms.temperature(), transforms.repetition_penalty())
    logits = np.full((2, V), -np.inf, np.float32)
    logits[:, :3] = [[3, 2, -1], [3e10, 2e10, 3e10]]
    found, _ = chain.update(jnp.asarray(logits), initial(chain, values, 2, [[0], [0]]))
    np.testing.assert_array_equal(found[:, :3], [[3, 4, -2], [0, -np.inf, 0]])


def test_the_first_token_and_guidance():
    values = {"forced_bos_token_id": [3, 3, None, None], "begin_suppress_tokens": [[3, 5], None, None, [5]]}
    values["guidance_scale"] = [1, 1, 2.5, 2.5]
    chain = transforms.chain(
        transforms.guidance(), transforms.forced_bos(), transforms.begin_suppress_tokens(after_forced_bos=True)
    )
    state = initial(chain, values, 4, [[5], [5, 6], [1], [1]])
    logits = np.random.default_rng(0).normal(size=(4, V)).astype(np.float32)
    logits[2, 4] = logits[3, 4] = -np.inf
    first, state = jax.jit(chain.update)(logits, state)
    state = chain.observe(jnp.full(4, 3, jnp.int32), state)
    second, _ = jax.jit(chain.update)(logits, state)
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in first[:2]] == [[3], [*range(V)]]
    assert np.flatnonzero(np.isinf(second[0])).tolist() == [3, 5]  # the forced token was the first
    c, u = (x - np.log(np.exp(x).sum()) for x in logits[2:].astype(np.float64))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(second[2], np.where(np.isinf(c), -np.inf, 2.5 * (c - u) + u), atol=1e-5)
    np.testing.assert_array_equal(second[2], second[3])
    assert np.flatnonzero(np.isinf(first[3])).tolist() == [4, 5]


def test_tokens_at_the_threshold_of_top_p():
    """Ten equal logits: as few as reach p, those of the greatest ids, whatever their number."""
    top_p = transforms.top_p()
    p = np.array([0.05, 0.15, 0.55, 0.95, 1], np.float32)
    logits = jax.jit(top_p.update)(jnp.zeros((5, 10)), p)[0]
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in logits] == [[*range(i, 10)] for i in (9, 8, 4, 0, 0)]


def test_the_example_of_the_page():
    page = pathlib.Path(__file__).parent.parent / "docs" / "sampling.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "def no_repeat_bigram" in block]
    names: dict = {}
    exec(example, names)
    rng = np.random.default_rng(0)
    prompts = [[1, 2, 1], [0], [3, 3, 4]]
    states, chains = [], (names["no_repeat_bigram"](), transforms.no_repeat_ngram())
    assert knobs.knob_names(chains[0]) == {"no_repeat_bigram"}
    for chain, values in zip(
        chains, ({"no_repeat_bigram": [True, True, False]}, {"no_repeat_ngram_size": [2, 2, 0]}), strict=True
    ):
        states.append(initial(chain, values, 3, prompts))
    steps = [jax.jit(lambda x, s, t, chain=chain: chain.update(x, chain.observe(t, s))) for chain in chains]
    banned = 0
    for _ in range(12):
        logits, token = rng.normal(size=(3, V)).astype(np.float32), rng.integers(0, 4, 3).astype(np.int32)
        results = [step(logits, state, token) for step, state in zip(steps, states, strict=True)]
        states = [state for _, state in results]
        np.testing.assert_array_equal(results[0][0], results[1][0])
        banned += np.isinf(results[0][0]).sum()
    assert banned > 20


def test_the_page_names_every_transform_in_the_standard_order():
    text = (pathlib.Path(__file__).parent.parent / "docs" / "sampling.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == list(transforms.STANDARD)
    assert knobs.KNOBS.keys() == transforms.STANDARD.keys()
    for name, factory in transforms.STANDARD.items():
        assert knobs.knob_names(factory()) == {name}
        assert f"`{factory.__name__}()`" in text


def test_equal_chains_are_one_object():
    assert transforms.standard_chain(["top_p"]) is transforms.DEFAULT
    assert transforms.standard_chain(["min_p", "top_h"]) is transforms.standard_chain(("top_h", "min_p"))
    parts = transforms.min_p(), transforms.top_p()
    assert transforms.chain(*parts) is transforms.chain(*parts) is not transforms.chain(*parts[::-1])
