"""Beam search, diverse beam search, contrastive search and the best of several samples.

tests/parity/test_search.py compares beam search with transformers. What transformers no longer has is in
oracles/search.json, made by its version 4.55.4 (oracles/make_search.py).
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

import garrulax as gx
from garrulax import models
from garrulax.core import spec

pytestmark = pytest.mark.usefixtures("quick_compilation")
THEIRS = json.loads((oracle.FOLDER / "search.json").read_text())
KINDS = {json.dumps(one["settings"]): one["settings"] for one in THEIRS["results"]}


@functools.cache
def large_weights(case):
    """The model of an oracle with all matrices times 5, in float64."""
    config = oracle.config(case)
    specs = models.parameters(config)
    params = oracle.params(case, np.float64)
    return jax.tree.map(lambda s, x: x if s.role == "vector" else 5 * x, specs, params, is_leaf=spec.is_spec), config


CASES = [
    pytest.param("llama_gqa", name, marks=() if "repetition" in name else pytest.mark.slow) for name in KINDS
] + [pytest.param("gpt2", name, marks=pytest.mark.slow) for name in KINDS]


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
