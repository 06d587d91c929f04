"""A session against `generate` of the whole prompts: the same tokens, of which only the new ones are read."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import garrulax as gx
from garrulax import models
from garrulax.layers.rope import Rope, frequencies, same_angles
from garrulax.sampling import Session, ahead, state
from garrulax.sampling.decoder import Decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")
KNOBS = {"max_new_tokens": 4, "temperature": 0.8, "end_tokens": ()}
LLAMA = dataclasses.replace(tiny.CONFIGS["llama"], context=256, layers=2)
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in tiny.CONFIGS if name not in ("llama", "dynamic")]


@pytest.fixture
def reads(monkeypatch):
    """For each call of `prefill` of a session: numbers of tokens kept, of tokens to read, of columns and slots."""
    calls, prefill = [], Decoder.prefill

    def noted(self, params, requests, size, past=None):
        if past is not None:
            calls.append((int(past.used[0]), int((requests.segment >= 0).sum()), requests.context.shape[1], past.size))
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


def model_of(config):
    return tiny.params(config), config


@pytest.mark.parametrize("family", ["llama", *OTHERS])
def test_turns_read_what_is_new_and_write_what_generate_writes(family, reads):
    config = LLAMA if family == "llama" else dataclasses.replace(tiny.CONFIGS[family], context=64)
    model, prompt, kept = model_of(config), list(range(20, 38)), 0
    session = Session(model)
    blanks = models.blanks(config)
    whole = blanks is not None and not blanks.causal  # all tokens attend to one another
    for turn in range(3):
        completion = same(model, session, prompt, seed=turn, **KNOBS)
        more = 1 if whole else 0  # the mask at the end, before <sop>
        assert reads[-1][:2] == (kept, len(prompt) - 1 - kept + 2 * more)
        assert session.read == ([] if whole else [*prompt, *completion.tokens[:-1]])
        assert session.reused == kept
        prompt = [*prompt, *completion.tokens, 7, 8]
        kept = len(session.read)
    if not whole:
        assert [call[1] for call in reads] == [17, 2, 2]  # the last token of an answer, and the first of the new two
    changed = [*prompt[:10], 1, *prompt[11:]]
    same(model, session, changed, **KNOBS)
    assert session.reused == (0 if whole else 10)
    session.forget()
    assert session.read == []


def test_interrupted_answers(reads, monkeypatch):
    """A generator that is closed keeps the partial answer, and a step that loses the state keeps the prompt."""
    model, prompt = model_of(LLAMA), list(range(20, 38))
    session = Session(model)
    pieces = session.stream(prompt, every=2, **KNOBS)
    assert next(pieces, None) is None  # without a tokenizer there are no pieces, so this runs to the end
    program, wanted = Decoder.program, session.read[18:]
    session.forget()

    def interrupted(self, params, before):
        step = program(self, params, before)

        def interrupted_step(params, before, n):
            after = step(params, before, n)
            if int(after.generated[0]) == 2:
                raise KeyboardInterrupt  # `before` was donated, and `after` is lost
            return after

        return interrupted_step

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "program", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.stream(prompt, every=1, **KNOBS))
    assert session.read == prompt[:-1]

    def interrupted_while_waiting(new, writers):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("garrulax.sampling.session.push_new_tokens", interrupted_while_waiting)
        with pytest.raises(KeyboardInterrupt):
            list(session.stream(prompt, every=2, **KNOBS))
    assert session.reused == 17
    assert session.read == [*prompt, *wanted[:1]]
    same(model, session, [*prompt, *wanted[:1], 9, 9], **KNOBS)
    assert reads[-1][:2] == (19, 1)


def test_programs_are_compiled_ahead_of_the_weights():
    config = dataclasses.replace(LLAMA, layers=1)
    params = tiny.params(config)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    Session((abstract, config)).compile_ahead([16], temperature=0)
    before = state.prefill_after._cache_size()
    list(Session((params, config)).stream(list(range(17)), **{**KNOBS, "temperature": 0}))
    assert state.prefill_after._cache_size() == before, "compiled again by the call"
    ahead.cancel()  # nothing is waiting: what was compiled stays
    list(Session((params, config)).stream(list(range(16)), **{**KNOBS, "temperature": 0}))
    assert state.prefill_after._cache_size() == before


def test_angles_that_depend_on_the_length():
    ropes = [
        Rope(), Rope(kind="dynamic", factor=4, original_context=16),
        Rope(kind="longrope", factor=4, original_context=16, short_factors=(1.0, 1.5), long_factors=(2.0, 3.0)),
    ]  # fmt: skip
    for rope in ropes:
        for one, other in ((3, 16), (16, 17), (17, 18), (9, 20)):
            a, b = (frequencies(rope, 4, np.array([length]), np.float32) for length in (one, other))
            assert same_angles(rope, one, other) == np.array_equal(a, b)


@pytest.mark.slow
def test_dynamic_rope_reads_again_what_was_rotated_by_other_angles():
    model = model_of(tiny.CONFIGS["dynamic"])  # of a context of 16, stretched to 64
    session = Session(model)
    first = same(model, session, [5, 6, 7], **KNOBS)
    prompt = [5, 6, 7, *first.tokens, 8, 9]
    same(model, session, prompt, **KNOBS)
    assert session.reused == 6
    same(model, session, [*prompt, 1, 2, 3, 4], **KNOBS)
    assert session.reused == 0
    same(model, session, [*prompt, 1, 2, 3, 4], **KNOBS)
    assert session.reused == 12


@pytest.mark.slow
def test_more_slots_and_the_end_of_the_context(reads):
    for context, kept, slots in ((512, 243, 512), (256, 240, 256)):
        model = model_of(dataclasses.replace(LLAMA, context=context))
        session, prompt = Session(model), [i % 90 for i in range(240)]
        completion = same(model, session, prompt, **KNOBS)
        assert reads[-1] == (0, 239, 256, 256)
        # A bucket of 16 columns does not fit behind 243 of 256 slots: there are more, or less is reused.
        same(model, session, [*prompt, *completion.tokens, 7, 8], **KNOBS)
        assert reads[-1] == (kept, 245 - kept, 16, slots)
    unstacked = gx.unstack(model[0]), model[1]
    session = Session(unstacked)
    first = same(unstacked, session, [5, 6, 7], **KNOBS)
    same(unstacked, session, [5, 6, 7, *first.tokens, 8], **KNOBS)
    assert session.reused == 6


def test_what_a_session_refuses():
    session = Session(model_of(LLAMA))
    for arguments, message in (
        ({"prompt": [[1, 2], [3]]}, "a session takes one prompt"),
        ({"prompt": [1, 2], "every": 0}, "every=0"),
        ({"prompt": [1, 2], "constrain": object()}, "no constrain"),
        ({"prompt": [1, 2], "search": gx.beam(2)}, "no search"),
        ({"prompt": [1, 2], "cache": "full"}, "one cache from its beginning"),
        ({"prompt": [1, 2], "guidance_scale": 2.0}, "no guidance_scale"),
        ({"prompt": [1] * 256}, "no space"),
    ):
        with pytest.raises(ValueError, match=message):
            session.stream(arguments.pop("prompt"), **arguments)
