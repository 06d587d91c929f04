"""Beam search, diverse beam search, contrastive search and the best of several samples.

tests/parity/test_search.py compares beam search with transformers. What transformers no longer has is in
oracles/search.json, made by its version 4.55.4 (oracles/make_search.py).
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.sampling.search.beams import search_steps
from garrulax.sampling.search.selecting import Sequences, select

pytestmark = pytest.mark.usefixtures("quick_compilation")
DOCS = pathlib.Path(__file__).parents[1] / "docs"
THEIRS = json.loads((oracle.FOLDER / "search.json").read_text())
KINDS = {json.dumps(one["settings"]): one["settings"] for one in THEIRS["results"]}


@functools.cache
def large_weights(case):
    """The model of an oracle with all matrices times 5, in float64."""
    config = oracle.config(case)
    specs = models.parameters(config)
    params = oracle.params(case, np.float64)
    return jax.tree.map(lambda s, x: x if s.role == "vector" else 5 * x, specs, params, is_leaf=spec.is_spec), config


CASES = [pytest.param("llama_gqa", name, marks=() if "repetition" in name else pytest.mark.slow) for name in KINDS] + [
    pytest.param("gpt2", name, marks=pytest.mark.slow) for name in KINDS
]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_searches_of_transformers_4(case, name):
    settings, ends, results = KINDS[name], THEIRS["common"]["ends"], THEIRS["results"]
    wanted = [one for one in results if one["model"] == case and one["settings"] == settings]
    diverse = "num_beams" in settings
    if diverse:
        names = {"num_beams": "beams", "num_beam_groups": "groups", "diversity_penalty": "penalty",
                 "length_penalty": "length_penalty", "early_stopping": "early_stopping"}  # fmt: skip
        given = {names[k]: v for k, v in settings.items() if k in names}
        search = gx.diverse_beam(returned=settings["num_beams"], **given)
    else:
        search = gx.contrastive(settings["top_k"], settings["penalty_alpha"])
    knobs = {k: settings[k] for k in ("repetition_penalty",) if k in settings}
    with jax.enable_x64(True):
        found = gx.generate(
            large_weights(case), [one["prompt"] for one in wanted], max_new_tokens=THEIRS["common"]["new"],
            end_tokens=ends, suppress_tokens=[THEIRS["common"]["pad"]], search=search, **knobs,
        )  # fmt: skip
    for own, one in zip(found, wanted, strict=True):
        own = own if diverse else [own]
        texts = [c.tokens[:-1] if c.finish_reason == "eos" else c.tokens for c in own]
        assert texts == [tokens for tokens, _ in one["sequences"]]
        assert [c.finish_reason == "eos" for c in own] == [ended for _, ended in one["sequences"]]
        if diverse:
            np.testing.assert_allclose([c.score for c in own], one["scores"], rtol=1e-4)


# -- Beam search ------------------------------------------------------------------------------------------------------

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]]


@functools.cache
def small(**changes):
    """A tiny model with large weights."""
    config = gx.preset("gpt2-tiny", layers=1, width=16, heads=2, vocab=31, eos=None, init_std=0.6, **changes)
    return gx.unstack(gx.init(config, jax.random.key(0))), config


@pytest.mark.parametrize("diverse", [False, True])
def test_a_step_does_not_sort_the_vocabulary(diverse):
    """XLA:CPU has a fast top-k; a slice of its result makes it a sort of all continuations, 80 ms of GPT-2's size."""
    P, K, V = 1, 4, 5000
    zero = jnp.zeros((P, K), jnp.float32)
    sequences = Sequences(
        zero, jnp.zeros((P, K, 8), jnp.int32), jnp.zeros((P, K, 8), jnp.float32), jnp.zeros((P, K), jnp.int32)
    )
    numbers = jnp.zeros(P, jnp.int32)
    arrays = jnp.zeros((P, K, V), jnp.float32), jnp.zeros((P, K, V), jnp.float32), sequences, sequences, numbers > 0
    more = numbers, numbers + 8, numbers[:, None], jnp.float32(1)
    program = jax.jit(lambda *x: select(*x, False, diverse)).lower(*arrays, *more).compile().as_text()
    assert not re.search(r" sort\(", program)


@pytest.mark.slow
def test_many_beams_find_the_most_probable_text():
    """64 beams keep all texts of 3 tokens in a vocabulary of 4; all texts of 4 are scored by a full pass."""
    config = dataclasses.replace(small()[1], vocab=4)
    model = (gx.unstack(gx.init(config, jax.random.key(1))), config)
    prompt, texts = [1, 2, 0], np.array(list(itertools.product(range(4), repeat=4)))
    logits, _ = gx.forward(model[0], np.concatenate([np.tile(prompt, (256, 1)), texts], axis=1), config)
    logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(256)[:, None], np.arange(2, 6)[None], texts].sum(axis=1)
    best = np.argsort(-logprobs)[:64]
    found = gx.generate(model, prompt, max_new_tokens=4, search=gx.beam(64, length_penalty=0, returned=64))
    assert [one.tokens for one in found] == texts[best].tolist()
    np.testing.assert_allclose([one.score for one in found], logprobs[best], rtol=1e-5)
    np.testing.assert_allclose([sum(one.logprobs) for one in found], logprobs[best], rtol=1e-5)


def test_a_batch_is_each_prompt_alone_and_other_numbers_compile_nothing():
    model, ends = small(), [7, 11, 19]
    knobs = {"max_new_tokens": [9, 12, 5], "end_tokens": ends, "repetition_penalty": [1, 1.2, 1.3]}
    together = gx.generate(model, PROMPTS, search=gx.beam(3, returned=2), **knobs)
    programs = search_steps._cache_size()
    alone = [
        gx.generate(
            model, [prompt] * 3, search=gx.beam(3, returned=2), max_new_tokens=new, end_tokens=ends,
            repetition_penalty=penalty,
        )[i]
        for i, (prompt, new, penalty) in enumerate(zip(PROMPTS, (9, 12, 5), (1, 1.2, 1.3), strict=True))
    ]  # fmt: skip
    assert [[one.tokens for one in own] for own in alone] == [[one.tokens for one in own] for own in together]
    longer = gx.generate(model, PROMPTS, search=gx.beam(3, length_penalty=-5.0), **knobs)
    (first, *_), same, n = together[0], longer[0], len(longer[0].tokens)
    assert same.tokens == first.tokens
    np.testing.assert_allclose(same.score, first.score * n * float(n) ** 5, rtol=1e-5)
    assert search_steps._cache_size() == programs


def entropy_penalty(logprobs):
    return 0.5 * jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def test_scores_of_the_caller_are_added():
    model, prompt = small(), PROMPTS[0]
    found = gx.generate(model, prompt, max_new_tokens=6, search=gx.beam(3, length_penalty=0, score=entropy_penalty))
    logits, _ = jax.jit(gx.forward, static_argnums=2)(model[0], np.array([[*prompt, *found.tokens]]), model[1])
    logprobs = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
    np.testing.assert_allclose(found.score, sum(found.logprobs) + float(entropy_penalty(logprobs).sum()), rtol=1e-5)


def test_best_of_are_the_samples_of_the_next_seeds():
    model, knobs = small(), {"max_new_tokens": [9, 6], "end_tokens": [7, 11, 19]}
    found = gx.generate(model, PROMPTS[:2], seed=[3, 8], search=gx.best_of(3, returned=3), **knobs)
    for prompt, own, seed, new in zip(PROMPTS, found, (3, 8), (9, 6), strict=False):
        wanted = gx.generate(
            model, [prompt] * 3, seed=[seed, seed + 1, seed + 2], max_new_tokens=new, end_tokens=[7, 11, 19]
        )
        wanted.sort(key=lambda one: -np.mean(one.logprobs))
        assert [one.tokens for one in own] == [one.tokens for one in wanted]
        np.testing.assert_allclose([one.score for one in own], [np.mean(one.logprobs) for one in wanted], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_family_searches(family):
    """A beam's score is that of a full pass over its text; one beam is greedy."""
    config = tiny.CONFIGS[family]
    model = (models.unstack(tiny.params(config)), config)
    prompt, ends = [3, 1, 4, 1, 5], [7]
    best = gx.generate(model, prompt, max_new_tokens=6, end_tokens=ends, search=gx.beam(4))
    if models.blanks(config) is None or models.blanks(config).causal:
        logits, _ = gx.forward(model[0], np.array([[*prompt, *best.tokens]]), config)
        rows = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
        np.testing.assert_allclose(best.logprobs, rows[np.arange(len(best.tokens)), best.tokens], rtol=1e-4, atol=1e-5)
    greedy = gx.generate(model, prompt, max_new_tokens=6, end_tokens=ends, temperature=0)
    for search in (gx.beam(1), gx.contrastive(3, 0.0)):
        assert gx.generate(model, prompt, max_new_tokens=6, end_tokens=ends, search=search).tokens == greedy.tokens


@pytest.mark.slow
def test_the_examples_of_the_documentation_run():
    names = {"gx": gx, "model": small(), "prompts": PROMPTS, "glm": tiny.byte_model("glm")}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "search.md").read_text(), re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(block, names)
    assert len(names["three"][0]) == 3
    assert names["filled"].text.startswith("The capital of")


def test_votes():
    example = runpy.run_path(str(DOCS.parent / "examples" / "self_consistency.py"))
    texts = ["3 times 4 is 12, so 12 - 2 = 10", "The answer is 1,000.", "no idea", "= 10", "It is 10."]
    assert example["vote"](texts) == [("10", 3), ("1000", 1)]


@pytest.mark.slow
def test_guidance_goes_with_beams():
    """Both rows of a pair choose the same tokens, so that one beam with guidance is the greedy text with guidance."""
    model, knobs = small(), {"max_new_tokens": 8, "guidance_scale": [2.0, 1.0, 1.5]}
    greedy = gx.generate(model, PROMPTS, temperature=0, **knobs)
    assert [one.tokens for one in gx.generate(model, PROMPTS, search=gx.beam(1), **knobs)] == [c.tokens for c in greedy]
    together = gx.generate(model, PROMPTS, search=gx.beam(3), **knobs)
    for prompt, own, scale in zip(PROMPTS, together, knobs["guidance_scale"], strict=True):
        alone = gx.generate(model, prompt, search=gx.beam(3), max_new_tokens=8, guidance_scale=scale)
        assert alone.tokens == own.tokens


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gx.beam(0), "beams=0 must be a whole number"),
        (lambda: gx.beam(2, returned=3), "returned=3 is more than beams=2"),
        (lambda: gx.beam(2, early_stopping="always"), "early_stopping='always' must be False, True"),
        (lambda: gx.beam(2, length_penalty=float("nan")), "length_penalty=nan must be a number"),
        (lambda: gx.beam(2, length_penalty=None), "length_penalty=None must be a number"),
        (lambda: gx.beam(2, score=3), "score must be a function"),
        (lambda: gx.diverse_beam(6, 4, 0.5), "4 groups do not divide 6 beams"),
        (lambda: gx.diverse_beam(6, 3, -1.0), "penalty=-1.0 must be at least 0"),
        (lambda: gx.contrastive(4, 1.5), "alpha=1.5 must be from 0 to 1"),
        (lambda: gx.contrastive(0, 0.5), "k=0 must be a whole number"),
        (lambda: gx.best_of(2, returned=3), "returned=3 is more than n=2"),
        (lambda: gx.generate(small(), [1], search=gx.contrastive(32, 0.5)), "k=32 is more than the 31 tokens"),
        (
            lambda: gx.generate(small(), [1], search=gx.beam(1000), max_new_tokens=2),
            "1000 beams are more than there are texts of 2",
        ),
        (lambda: gx.generate(small(), [1], search=gx.beam(2), temperature=0.5), "beam search draws nothing at random"),
        (lambda: gx.generate(small(), [1], search=gx.best_of(2), temperature=0), "temperature=0 makes all samples"),
        (lambda: gx.generate(tiny.byte_model(), "a", search=gx.beam(2), stop="b"), "cannot end at stop strings"),
        (lambda: gx.stream(small(), [1], search=gx.beam(2)), "stream cannot search"),
        (lambda: gx.generate(small(), [1], search="beam"), "search must be gx.beam"),
        (
            lambda: gx.generate(small(), [1], search=gx.beam(2), suppress_tokens=list(range(31))),
            "the transform leaves no token for prompt 0",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        make()
