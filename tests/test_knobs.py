"""Knobs: values for one prompt or for each, their arrays, and errors that name what is wrong. Compiles nothing."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from garrulax.sampling import transforms
from garrulax.sampling.knobs import KNOBS, knob_arrays, knob_names, knobs_per_prompt
from garrulax.sampling.transforms import Transform, standard_chain

BAD = {
    "temperature=-0.1 must be a number of at least 0": {"temperature": -0.1},
    "top_p=0 must be above 0 and at most 1": {"top_p": 0},
    "top_p=1.5 must be": {"top_p": [0.5, 1.5]},
    "top_k=1.5 must be a whole number": {"top_k": 1.5},
    "top_k=100 is more than the 99 tokens of the vocabulary": {"top_k": 100},
    "min_p=2 must be a number from 0 to 1": {"min_p": 2},
    "top_h=0 must be": {"top_h": 0},
    "typical_p=nan must be": {"typical_p": float("nan")},
    "epsilon_cutoff=1 must be at least 0 and below 1": {"epsilon_cutoff": 1},
    "repetition_penalty=0 must be a number above 0": {"repetition_penalty": 0},
    "frequency_penalty='much' must be a number": {"frequency_penalty": "much"},
    "presence_penalty=inf must be a number": {"presence_penalty": float("inf")},
    "no_repeat_ngram_size=-1 must be": {"no_repeat_ngram_size": -1},
    "min_length=True must be": {"min_length": True},
    "forced_bos_token_id=-5 must be a token id": {"forced_bos_token_id": -5},
    "forced_eos_token_id has token id 99: this model's ids are 0 to 98": {"forced_eos_token_id": 99},
    "suppress_tokens has token id 99": {"suppress_tokens": [1, 99]},
    "suppress_tokens has 3 values for 2 prompts": {"suppress_tokens": [[1], [2], None]},
    "allowed_tokens=['a'] must be a list of token ids": {"allowed_tokens": ["a"]},
    "allowed_tokens=[] must be a list of token ids, at least one (None is off)": {"allowed_tokens": [[5], []]},
    "bad_words_ids=5 must be a list of lists of token ids": {"bad_words_ids": 5},
    "bad_words_ids has token id 99": {"bad_words_ids": [[[1]], [[2, 99]]]},
    "sequence_bias={5: 1.0} must be a dict from tuples": {"sequence_bias": {5: 1.0}},
    "sequence_bias={(): 1.0} must be": {"sequence_bias": {(): 1.0}},
    "sequence_bias has token id 100": {"sequence_bias": {(3, 100): 1.0}},
    "logit_bias={'x': 1} must be a dict from token ids": {"logit_bias": {"x": 1}},
    "logit_bias has token id 100": {"logit_bias": {100: 1}},
    "exponential_decay_length_penalty=(5, 0) must be": {"exponential_decay_length_penalty": (5, 0)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        knobs_per_prompt(2, vocab=99, **BAD[message])
    assert "\n" not in str(error.value)


def test_knobs_that_nothing_reads_and_knobs_without_a_value():
    with pytest.raises(
        ValueError, match=r"^there is no knob 'repetition_penality': did you mean repetition_penalty\?$"
    ):
        standard_chain(["repetition_penality"])
    mine = Transform(lambda knobs: (knobs["mine"], knobs.get("other", 1)), lambda logits, state: (logits, state))
    chain = transforms.chain(mine, transforms.top_p())
    assert knob_names(chain) == {"mine", "other", "top_p"}
    with pytest.raises(ValueError, match=r"no transform of the chain reads the knob 'min_p': add .* to it$"):
        knob_arrays(chain, knobs_per_prompt(1, mine=1, min_p=0.1), 1)
    with pytest.raises(ValueError, match=r"no transform of the chain reads the knob 'top_pp': did you mean top_p\?$"):
        knob_arrays(chain, knobs_per_prompt(1, mine=1, top_pp=0.1), 1)
    with pytest.raises(ValueError, match=r"reads the knob 'mine', which has no default: give mine=\.\.\.$"):
        knob_arrays(chain, {}, 1)
    with pytest.raises(ValueError, match=r"mine='much' must be a number"):
        knob_arrays(chain, knobs_per_prompt(1, mine="much"), 1)
    arrays = knob_arrays(chain, knobs_per_prompt(1, mine=1, min_p=0, seed=3), 1)  # min_p is off
    assert arrays.keys() == {"mine", "top_p"}


def test_dtypes_and_shapes_of_own_knobs():
    def init(knobs):
        return knobs["flag"] & (knobs["count"] > 0), knobs["heat"] * knobs["direction"][:, 1]

    own = Transform(init, lambda logits, state: (logits, state))
    given = {"flag": True, "count": [1, 2], "heat": 0.5, "direction": np.ones((2, 3)), "temperature": 0}
    with pytest.raises(ValueError, match="'temperature'"):
        knob_arrays(own, knobs_per_prompt(2, **given), 4)
    del given["temperature"]
    arrays = knob_arrays(own, knobs_per_prompt(2, **given), 4)
    found = {name: (x.dtype.name, x.shape) for name, x in arrays.items()}
    assert found == {
        "flag": ("bool", (4,)),
        "count": ("int32", (4,)),
        "heat": ("float32", (4,)),
        "direction": ("float32", (4, 3)),
    }
    assert arrays["count"].tolist() == [1, 2, 2, 2]  # rows without a prompt have the last one's


def test_one_value_or_one_a_prompt():
    given = knobs_per_prompt(
        2,
        suppress_tokens=[4, 5, 6, 7, 8],
        forced_eos_token_id=[3, None],
        bad_words_ids=[[[5]], [[6, 7, 8], [9]]],
        sequence_bias=[[[5, 6], 2.0]],
        logit_bias=[{3: 1.5}, None],
        temperature=jnp.array([0, 0.5]),
        top_k=7,
        exponential_decay_length_penalty=(3, 1.5),
    )
    arrays = knob_arrays(standard_chain(given), given, 3)
    assert arrays["suppress_tokens"].tolist() == [[4, 5, 6, 7, 8, -1, -1, -1]] * 2 + [[-1] * 8]
    assert arrays["forced_eos_token_id"][:, 0].tolist() == [3, -1, -1]
    assert arrays["bad_words_ids"][:, :2].tolist() == [
        [[-1, -1, -1, 5], [-1] * 4],
        [[-1, 6, 7, 8], [-1, -1, -1, 9]],
        [[-1] * 4] * 2,
    ]
    assert [x[:2, 0].tolist() for x in arrays["sequence_bias"]] == [[[5, 6], [5, 6]], [2.0, 2.0]]
    assert [x[:2, 0].tolist() for x in arrays["logit_bias"]] == [[3, -1], [1.5, 0]]
    assert arrays["top_k"].tolist() == [0, 7, 0]  # a greedy row needs no filter
    assert arrays["exponential_decay_length_penalty"].tolist() == [[3, 1.5], [3, 1.5], [0, 1]]
    assert arrays["temperature"].dtype == np.float32
    every = knob_arrays(standard_chain(KNOBS), {}, 1)
    assert every.keys() == KNOBS.keys()
