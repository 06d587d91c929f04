"""A session against `generate` of the whole prompts: the same tokens, of which only the new ones are read."""

import dataclasses

import numpy as np
import pytest
import tiny

import garrulax as gx
from garrulax import models
from garrulax.layers.rope import Rope, frequencies, same_angles
from garrulax.sampling import Session, ahead
from garrulax.sampling.decoder import Decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")
KNOBS = {"max_new_tokens": 10, "temperature": 0.8, "end_tokens": ()}
SLOW = [name for name in tiny.CONFIGS if name not in ("llama", "glm", "glm130b", "dynamic")]


@pytest.fixture
def reads(monkeypatch):
    """What each call of `prefill` got: numbers of tokens kept, of tokens to read, of columns, and of slots."""
    calls, prefill = [], Decoder.prefill

    def noted(self, params, requests, size, past=None):
        if past is not None:
            tokens = int((requests.segment >= 0).sum())
            calls.append((int(past.used[0]), tokens, requests.context.shape[1], past.size))
        return prefill(self, params, requests, size, past)

    monkeypatch.setattr(Decoder, "prefill", noted)
    return calls


def same(model, session, prompt, **knobs):
    """The completion of a session, which is that of `generate`."""
    _, found = tiny.drained(session.stream(prompt, **knobs))
    wanted = gx.generate(model, prompt, **knobs)
    assert (found.tokens, found.text, found.finish_reason) == (wanted.tokens, wanted.text, wanted.finish_reason)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)
    return found


@pytest.mark.parametrize("family", ["llama", "glm", *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]])
def test_turns_read_what_is_new_and_write_what_generate_writes(family, reads):
    config = dataclasses.replace(tiny.CONFIGS[family], **({} if family == "dynamic" else {"context": 64}))
    model, prompt = (tiny.params(config), config), list(range(20, 33))
    session = Session(model)
    whole = models.blanks(config) is not None and not models.blanks(config).causal
    kept = 0
    for turn in range(3):
        completion = same(model, session, prompt, seed=turn, **KNOBS)
        assert reads[-1][:3] == (kept, len(prompt) - 1 - kept, 16)
        assert session.read == ([] if whole else [*prompt, *completion.tokens[:-1]])
        prompt = [*prompt, *completion.tokens, 7, 8, turn]
        kept = len(session.read)
    assert reads[0][1] == 12
    assert whole or [call[1] for call in reads[1:]] == [3, 3]


def test_other_turns():
    pass
