"""Speculation is exact in distribution: the first three tokens against the closed form, for 400,000 texts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import garrulax as gx
from garrulax import models, sampling
from garrulax.sampling.requests import prepare_model
from garrulax.sampling.speculate.draft import DraftMemory, draft
from garrulax.sampling.speculate.loop import Speculating, speculate_steps
from garrulax.sampling.transforms import Transform

pytestmark = pytest.mark.slow
V, PROMPT, TOKENS, ROWS, BATCHES = 5, [3, 1], 3, 40_000, 10
ALLOWED = np.array([[0, 1, 1, 0, 1], [1, 0, 1, 1, 0], [1, 1, 0, 1, 1], [0, 1, 1, 0, 1], [1, 0, 0, 1, 0]], bool)


def follows():
    """A grammar: ALLOWED[a, b] says whether token b may follow token a. The first of a text follows token 0."""

    def update(logits, last):
        return jnp.where(jnp.asarray(ALLOWED)[last], logits, -jnp.inf), last

    return Transform(lambda knobs: jnp.zeros_like(knobs["limit"]), update, lambda token, last: token)


def top_p(x, p):
    probabilities = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    order = np.argsort(-probabilities)
    kept = order[np.cumsum(probabilities[order]) - probabilities[order] < p]
    return np.where(np.isin(np.arange(V), kept), x, -np.inf)


def penalised(x, text):
    return np.where(np.isin(np.arange(V), text), np.where(x < 0, x * 1.7, x / 1.7), x)


#: name -> (transform, knobs, the same for float64 logits after a text)
CASES = {
    "temperature": (sampling.temperature(), {"temperature": 0.6}, lambda x, text: x / 0.6),
    "top_p": (sampling.top_p(), {"top_p": 0.8}, lambda x, text: top_p(x, 0.8)),
    "top_k": (sampling.top_k(), {"top_k": 2}, lambda x, text: np.where(x >= np.sort(x)[-2], x, -np.inf)),
    "penalty": (sampling.repetition_penalty(), {"repetition_penalty": 1.7}, penalised),
    "grammar": (
        follows(),
        {},
        lambda x, text: np.where(ALLOWED[text[-1] if len(text) > len(PROMPT) else 0], x, -np.inf),
    ),
}


def model_of(seed):
    config = gx.preset("gpt2-tiny", vocab=V, context=16, width=8, layers=1, heads=2, init_std=0.8, eos=None, bos=None)
    return gx.unstack(models.init(config, jax.random.key(seed))), config


def closed_form(model, change):
    """P of each of the 125 beginnings, in float64."""
    params, config = model
    texts = [[*PROMPT, *more] for n in range(TOKENS) for more in itertools.product(range(V), repeat=n)]
    after = {}
    for text in texts:
        logits, _ = gx.forward(params, jnp.array([text]), config)
        x = change(np.asarray(logits[0, -1], np.float64), text)
        after[tuple(text)] = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    return np.array(
        [
            np.prod([after[(*PROMPT, *cell[:i])][cell[i]] for i in range(TOKENS)])
            for cell in itertools.product(range(V), repeat=TOKENS)
        ]
    )


@pytest.mark.parametrize("name", CASES)
def test_first_tokens(name):
    transform, knobs, change = CASES[name]
    model, small = model_of(0), model_of(1)
    decoder = sampling.compile(model, transform)
    one = decoder.request(PROMPT, max_new_tokens=TOKENS, **knobs)
    wide = {f.name for f in dataclasses.fields(one)} - {"context", "segment", "rank", "positions"}
    many = dataclasses.replace(one, **{k: jax.tree.map(lambda x: np.repeat(x, ROWS, 0), getattr(one, k)) for k in wide})
    rows = np.arange(ROWS, dtype=np.int32)
    bound = draft(small, tokens=2).bind(prepare_model(model)[0], model[1], transform, one, 16)
    counts, passes = [np.zeros(V**TOKENS, int) for _ in range(2)], 0
    for batch in range(BATCHES * 2):
        seeded = dataclasses.replace(many, seed=(rows + batch * ROWS).astype(np.uint32))
        states = [
            d.insert(d.empty(m[0], p, ROWS, 16), p, rows)
            for m, d in ((model, decoder), (small, sampling.compile(small, transform)))
            for p in [d.prefill(m[0], seeded, 16)]
        ]
        memory = DraftMemory(states[1].cache, states[1].position, states[1].stride)
        spec = Speculating(states[0], memory, jnp.zeros(ROWS, jnp.int32))
        out = speculate_steps(model[0], bound.params, spec, 9, model[1], transform, bound.proposer)
        cells = np.asarray(out.state.tokens)[:, :TOKENS] @ V ** np.arange(TOKENS)[::-1]
        counts[batch // BATCHES] += np.bincount(cells, minlength=V**TOKENS)
        passes += int(out.passes.sum())
    wanted = closed_form(model, change)
    texts = ROWS * BATCHES
    assert texts * 2 < passes < texts * 2 * TOKENS  # some drafts were accepted and some were not
    rng = np.random.default_rng(0)
    noise = np.mean([distance(rng.multinomial(texts, wanted), wanted) for _ in range(20)])
    for seed, found in enumerate(counts):
        assert found[wanted == 0].sum() == 0
        usual = wanted * texts >= 5
        observed = np.append(found[usual], found[~usual].sum())
        expected = np.append(wanted[usual], wanted[~usual].sum()) * texts
        kept = expected > 0
        p = scipy.stats.chisquare(observed[kept], expected[kept] * observed.sum() / expected.sum()).pvalue
        print(f"{name}, seed {seed}: p {p:.3f}, TV {distance(found, wanted):.5f}, of an exact sampler {noise:.5f}")
        assert p >= 1e-4
        assert distance(found, wanted) < 2 * noise


def distance(counts, p):
    """Total variation."""
    return 0.5 * np.abs(counts / counts.sum() - p).sum()
