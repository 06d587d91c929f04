"""generate and stream against full forward passes, and against themselves in other company."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import garrulax as gx
from garrulax import models, sampling
from garrulax.sampling import transforms
from garrulax.sampling.buckets import bucket
from garrulax.sampling.knobs import knobs_per_prompt
from garrulax.sampling.loop import decode_steps
from garrulax.sampling.requests import assemble, causal_prompt
from garrulax.sampling.writing import Writer

pytestmark = pytest.mark.usefixtures("quick_compilation")
#: A GLM, which has two positions a token, is in test_fill too.
FAMILIES = [pytest.param("gpt", marks=pytest.mark.slow), pytest.param("glm", marks=pytest.mark.slow), "llama"]
PROMPTS = [[5, 17, 3], [9], list(range(20, 41)), [7, 7, 7, 7, 1, 2, 3, 4], [50, 60]]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    config = tiny.CONFIGS[request.param]
    if request.param == "glm":
        config = dataclasses.replace(config, eos=999, eop=999)  # never made: no row ends early
    return tiny.params(config), config


@functools.partial(jax.jit, static_argnames="config")
def full_pass(params, ids, config):
    return jax.nn.log_softmax(models.forward(params, ids, config)[0], axis=-1)


def forward_text(params, config, prompt, new, choose):
    """The text by one full forward pass a token, without a cache: choose(log-probabilities [V], position) -> id."""
    ids, logprobs = list(prompt), []
    width = 40
    # One shape for all passes: what is right of a token does not reach it.
    for _ in range(new):
        row = np.zeros((1, width), np.int32)
        row[0, : len(ids)] = ids
        logp = np.asarray(full_pass(params, row, config))[0, len(ids) - 1]
        ids.append(int(choose(logp, len(ids))))
        logprobs.append(logp[ids[-1]])
    return ids[len(prompt) :], logprobs


def test_greedy_is_the_argmax_of_full_passes(model):
    params, config = model
    whole = [forward_text(params, config, prompt, 12, lambda logp, _: logp.argmax()) for prompt in PROMPTS[1:3]]
    out = gx.generate((params, config), PROMPTS[1:3], max_new_tokens=12, temperature=0)
    assert [c.tokens for c in out] == [ids for ids, _ in whole]
    assert len({token for ids, _ in whole for token in ids}) > 8, "texts that repeat themselves test little"
    np.testing.assert_allclose([c.logprobs for c in out], [logprobs for _, logprobs in whole], atol=2e-5)
    assert {(c.text, c.finish_reason) for c in out} == {(None, "length")}


def test_sampling_is_gumbel_argmax_of_full_passes(model):
    params, config = model

    def choose(logp, position):
        key = jax.random.fold_in(jax.random.key(11, impl="threefry2x32"), position)
        noise = jax.random.gumbel(key, logp.shape, jnp.float32, mode="high")
        return np.argmax(logp / 0.8 + np.asarray(noise))

    ids, logprobs = forward_text(params, config, PROMPTS[2], 12, choose)
    out = gx.generate((params, config), PROMPTS[2], max_new_tokens=12, temperature=0.8, seed=11)
    assert out.tokens == ids
    np.testing.assert_allclose(out.logprobs, logprobs, atol=2e-5)  # of the model, not of the tempered distribution


def test_dynamic_rope_plans_for_the_whole_text():
    """Past the original context the frequencies depend on the length: those of the planned length hold throughout."""
    config, prompt, new = tiny.CONFIGS["dynamic"], PROMPTS[2], 12
    params = tiny.params(config)
    out = gx.generate((params, config), prompt, max_new_tokens=new, temperature=0)
    ids = [*prompt, *out.tokens]
    cache = models.cache_for(params, config, 1, len(ids))
    forward = jax.jit(models.forward, static_argnames="config")
    logits, _ = forward(params, jnp.array([ids]), config, cache=cache)  # planned: all of its slots
    np.testing.assert_array_equal(out.tokens, logits[0, len(prompt) - 1 : -1].argmax(-1))


KNOBS = {
    "max_new_tokens": [12, 13, 3, 16, 1],
    "temperature": [0, 1.0, 0.7, 1.5, 1.0],
    "top_k": [0, 0, 5, 0, 3],
    "top_p": [1, 0.9, 1, 0.5, 0.8],
    "seed": [0, 1, 2, 2, 4_000_000_000],
}


def test_alone_in_a_batch_and_in_another_order(model):
    together = gx.generate(model, PROMPTS, **KNOBS)
    for i, prompt in enumerate(PROMPTS):
        alone = gx.generate(model, prompt, **{k: v[i] for k, v in KNOBS.items()})
        assert alone.tokens == together[i].tokens
        assert len(alone.tokens) == KNOBS["max_new_tokens"][i]
        assert alone.logprobs == together[i].logprobs  # on a CPU to the last bit
    order = [3, 0, 4, 2, 1]
    shuffled = gx.generate(model, [PROMPTS[i] for i in order], **{k: [v[i] for i in order] for k, v in KNOBS.items()})
    assert [c.tokens for c in shuffled] == [together[i].tokens for i in order]
    one_seed = gx.generate(model, [PROMPTS[0]] * 3, max_new_tokens=8, seed=5)
    assert one_seed[0].tokens == one_seed[1].tokens == one_seed[2].tokens
    assert gx.generate(model, PROMPTS[0], max_new_tokens=8, seed=6).tokens != one_seed[0].tokens


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_alone_and_in_a_batch_with_weights_of_few_bits(kind):
    """Matrices large enough for loops over blocks and for the processor's products of few bits."""
    config = gx.preset("gpt2-tiny", layers=1, width=768, heads=12, vocab=512, eos=None)
    params = gx.init(config, jax.random.key(0))
    if kind == "bfloat16":
        model = jax.tree.map(lambda x: x.astype(kind), params), config
    else:
        model = gx.quantise((params, config), kind)
    together = gx.generate(model, PROMPTS[:3], max_new_tokens=8, seed=1)
    for prompt, one in zip(PROMPTS, together, strict=False):
        alone = gx.generate(model, prompt, max_new_tokens=8, seed=1)
        assert (alone.tokens, alone.logprobs) == (one.tokens, one.logprobs)


def test_rows_of_one_state_start_late_end_early_and_make_room():
    """One state, as a server keeps it: rows come and go, and each has the tokens that it has alone, bit for bit."""
    config = tiny.CONFIGS["gpt"]
    stacked = tiny.params(config)
    params, decoder = models.unstack(stacked), sampling.compile((stacked, config))
    knobs = [{key: values[i] for key, values in KNOBS.items()} for i in range(5)]
    alone = [gx.generate((stacked, config), ids, **k) for ids, k in zip(PROMPTS, knobs, strict=True)]
    requests = [decoder.request(ids, **k) for ids, k in zip(PROMPTS, knobs, strict=True)]

    def put(state, i, row):
        return decoder.insert(state, decoder.prefill(stacked, requests[i], size=64), row)

    def new(state, row, i):
        count = int(state.generated[row])
        assert state.tokens[row, :count].tolist() == alone[i].tokens[:count]
        assert state.logprobs[row, :count].tolist() == alone[i].logprobs[:count]
        return count

    state = decoder.empty(params, decoder.prefill(stacked, requests[0], size=64), rows=2, slots=64)
    state = put(state, 3, 1)
    # The free row has the request's knobs, and so switches no transform on that no request wants.
    assert all((x[0] == x[1]).all() for x in jax.tree.leaves(state.transform_state))
    state = put(decoder.step(params, state, 5), 0, 0)  # starts when the other row has five tokens
    state = decoder.step(params, state, 4)
    assert (new(state, 0, 0), new(state, 1, 3)) == (4, 9)
    state = decoder.evict(state, jnp.array([False, True]))
    state = put(state, 2, 1)
    state = decoder.step(params, state, 100)
    assert (new(state, 0, 0), new(state, 1, 2)) == (12, 3)
    assert state.done.tolist() == [True, True]
    state = decoder.insert(state, decoder.prefill(params, requests[1], size=64), 0)  # parameters of the other form
    assert new(decoder.step(params, state, 100), 0, 1) == 13


@functools.cache
def never_twice():
    """A transform whose state is made of the prompt: no token that the text already has."""

    def init(knobs):
        text = jnp.pad(knobs["prompt"], ((0, 0), (0, knobs["size"])), constant_values=-1)
        return text, jnp.sum(knobs["prompt"] >= 0, axis=1)

    def update(logits, state):
        text, _ = state
        rows = jnp.arange(len(text))[:, None]
        return logits.at[rows, jnp.where(text < 0, logits.shape[1], text)].set(-jnp.inf, mode="drop"), state

    def observe(token, state):
        text, length = state
        return text.at[jnp.arange(len(text)), length].set(token), length + 1

    return transforms.Transform(init, update, observe)


def test_states_of_transforms_fit_together_and_what_does_not_is_refused():
    config = tiny.SHALLOW["gpt"]
    stacked = tiny.params(config)
    chain = transforms.chain(never_twice(), transforms.logit_bias(), transforms.temperature())
    arguments = {"transform": chain, "temperature": 0, "max_new_tokens": 2, "logit_bias": {0: 1e4}}
    # The context of the first falls into the bucket of 32, that of the second into the one of 16.
    assert [c.tokens[0] for c in gx.generate((stacked, config), [list(range(20, 41)), [3]], **arguments)] == [0, 0]

    decoder = sampling.compile((stacked, config), transforms.standard_chain(["suppress_tokens"]))
    few, many = (decoder.request([5, 17, 3], max_new_tokens=4, suppress_tokens=ids) for ids in ([7], [*range(40)]))
    prefix = decoder.prefill(stacked, few, size=64)
    state = decoder.empty(models.unstack(stacked), prefix, rows=2, slots=16)
    with pytest.raises(ValueError, match="have the shape"):
        decoder.insert(state, decoder.prefill(stacked, many, size=64), 0)
    with pytest.raises(ValueError, match="rows must be bool"):
        decoder.evict(state, jnp.array([1]))
    long = decoder.request(range(20, 41), max_new_tokens=4, suppress_tokens=[7])
    with pytest.raises(ValueError, match="has 32 slots, but the rows of the state have 16"):
        decoder.insert(state, decoder.prefill(stacked, long, size=64), 0)
    with pytest.raises(ValueError, match=r"rows 0 to 1, not \[2\]"):
        decoder.insert(state, decoder.prefill(stacked, many, size=64), 2)


def test_given_tokens_are_appended_as_if_they_had_been_sampled():
    config = tiny.SHALLOW["llama"]
    stacked = tiny.params(config)
    params, decoder = models.unstack(stacked), sampling.compile((stacked, config))
    requests = [decoder.request(ids, max_new_tokens=9, temperature=0) for ids in PROMPTS[:2]]
    alone = gx.generate((stacked, config), PROMPTS[:2], max_new_tokens=9, temperature=0)
    prefixes = [decoder.prefill(stacked, request, size=32) for request in requests]
    state = decoder.empty(params, prefixes[0], rows=2, slots=32)
    for row, prefix in enumerate(prefixes):
        state = decoder.insert(state, prefix, row)
    state = decoder.step(params, state, 2)
    given = np.array([alone[0].tokens[2:6], [*alone[1].tokens[2:4], 7, 7]], np.int32)
    state = decoder.append(params, state, given, np.array([4, 2], np.int32))
    assert state.cache.used.tolist() == [len(PROMPTS[0]) - 1 + 6, len(PROMPTS[1]) - 1 + 4]
    state = decoder.append(params, state, given, np.zeros(2, np.int32))
    state = decoder.step(params, state, 100)
    for row, text in enumerate(alone):
        assert state.tokens[row, :9].tolist() == text.tokens
        np.testing.assert_allclose(state.logprobs[row, :9], text.logprobs, atol=1e-5)
    assert state.done.tolist() == [True, True]


def test_a_row_is_rolled_back_by_its_length():
    config = tiny.SHALLOW["llama"]
    params = models.unstack(tiny.params(config))
    forward = jax.jit(models.forward, static_argnames="config")
    read = jnp.array([[5, 6, 7, 8], [9, 3, 2, 1]])
    _, cache = forward(params, read, config, cache=models.cache_for(params, config, 2, 12))
    cache = dataclasses.replace(cache, used=jnp.array([2, 4]))
    more = jnp.array([[4, 4, 2], [4, 4, 2]])
    logits, cache = forward(params, more, config, cache=cache)
    assert cache.used.tolist() == [5, 7]
    for row, text in enumerate(([5, 6, 4, 4, 2], [9, 3, 2, 1, 4, 4, 2])):
        wanted, _ = forward(params, jnp.array([text]), config)
        np.testing.assert_allclose(logits[row], wanted[0, -3:], atol=1e-5)


def test_one_executable_for_all_knobs():
    config = tiny.SHALLOW["gpt"]
    model, traces = (models.unstack(tiny.params(config)), config), []

    def count(logits, state):
        traces.append(None)
        return transforms.DEFAULT.update(logits, state)

    counting = sampling.Transform(transforms.DEFAULT.init, count)
    for temperature, top_k, top_p, seed, new in [
        (0, 0, 1, 0, 16),
        (1, 0, 1, 1, 9),
        (0.5, 3, 0.9, 2, 3),
        (2, 50, 0.1, 3, 1),
    ]:
        knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "max_new_tokens": new}
        gx.generate(model, PROMPTS[:3], transform=counting, **knobs)
        gx.generate(model, PROMPTS[1:4], transform=counting, **knobs)
    list(gx.stream(model, PROMPTS[0], transform=counting, max_new_tokens=10))
    assert len(traces) == 2  # a state of four rows, and one of two for the stream


def test_equal_chains_compile_once():
    config = tiny.SHALLOW["gpt"]
    model, traces = (models.unstack(tiny.params(config)), config), []

    def count(logits, state):
        traces.append(None)
        return logits, state

    counting = sampling.Transform(lambda knobs: (), count)
    for heat in (0.5, 1.5):
        chain = sampling.chain(counting, sampling.temperature(), sampling.top_k(), sampling.top_p())
        gx.generate(model, PROMPTS[0], transform=chain, temperature=heat, max_new_tokens=3)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(2, "float32"), (2, "bfloat16")]
    + [pytest.param(rows, dtype, marks=pytest.mark.slow) for rows, dtype in [(4, "float32"), (4, "float16")]],
)
def test_the_cache_is_updated_in_place(rows, dtype):
    """A run needs no room of the cache's size, and gives the cache back where it was."""
    config = dataclasses.replace(tiny.CONFIGS["llama"], width=256, head_dim=64, heads=4, kv_heads=2)
    params = jax.tree.map(lambda x: x.astype(dtype), models.unstack(tiny.params(config)))
    knobs = knobs_per_prompt(rows, max_new_tokens=10, temperature=0, top_k=0, top_p=1.0, seed=0)
    request = assemble([causal_prompt([1, 2, 3], 10, config, "")], {k: v[:1] for k, v in knobs.items()}, config)
    decoder = sampling.compile((params, config))
    state = jax.eval_shape(lambda: decoder.empty(params, decoder.prefill(params, request, 4096), rows, 4096))
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    memory = decode_steps.lower(params, state, 1, config).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= kept
    # A layer's scores and the mask take a few numbers a slot; its keys alone would take 128, a quarter of the cache.
    # Weights in 16 bits are converted to float32 in blocks, which takes some more.
    assert memory.temp_size_in_bytes < kept / (16 if dtype == "float32" else 8)


def test_eos_ends_a_row_and_only_that_row():
    config = tiny.SHALLOW["llama"]
    params = tiny.params(config)
    free = gx.generate((params, config), PROMPTS, max_new_tokens=12, temperature=0)
    first, second = free[0].tokens[4], free[3].tokens[2]
    ending = dataclasses.replace(config, eos=(first, second))
    out = gx.generate((params, ending), PROMPTS, max_new_tokens=12, temperature=0)
    for ended, whole in zip(out, free, strict=True):
        at = [i for i, token in enumerate(whole.tokens) if token in (first, second)]
        assert ended.tokens == (whole.tokens[: at[0] + 1] if at else whole.tokens)
        assert ended.finish_reason == ("eos" if at else "length")
    assert "eos" in {c.finish_reason for c in out}
    exact = gx.generate((params, ending), PROMPTS[0], max_new_tokens=len(out[0].tokens), temperature=0)
    assert (exact.tokens, exact.finish_reason) == (out[0].tokens, "eos")


@pytest.mark.slow
def test_bfloat16_logits_are_drawn_from_in_float32():
    """Thousands of seeds in one batch, one token each, against the softmax of the model's bfloat16 logits."""
    from test_sampling import p_value

    config = dataclasses.replace(tiny.CONFIGS["gpt"], init_std=0.1)
    params = models.init(config, jax.random.key(0), dtype=jnp.bfloat16)
    rows = 2048
    out = gx.generate((params, config), [[3, 1, 4]] * rows, max_new_tokens=1, seed=list(range(rows)))
    logits = models.forward(params, jnp.array([[3, 1, 4]]), config)[0][0, -1]
    target = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)), np.float64)
    assert p_value(np.array([c.tokens[0] for c in out]), target / target.sum()) > 1e-4


# -- Text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_model():
    return tiny.byte_model("gpt", layers=1, bos=None)


@pytest.mark.parametrize("every", [1, 3, 64])
def test_a_stream_is_generates_text(bytes_model, every):
    knobs = {"max_new_tokens": 40, "temperature": 1.2, "seed": 5}
    whole = gx.generate(bytes_model, "Once", **knobs)
    assert whole.text == bytes_model.tokenizer.decode(whole.tokens, start=False) == str(whole)
    made, last = tiny.drained(gx.stream(bytes_model, "Once", every=every, **knobs))
    assert "".join(made) == whole.text
    assert last == whole
    stop = whole.text[9:12]
    cut = gx.generate(bytes_model, "Once", stop=["never-made", stop], **knobs)
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.find(stop)], "stop")
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    made, last = tiny.drained(gx.stream(bytes_model, "Once", every=every, stop=stop, **knobs))
    assert "".join(made) == cut.text
    assert last == cut


class Words:
    """Tokens that are pieces of text, with the interface of a tokenizer."""

    strips_space = False
    spaces_words = False

    def __init__(self, *words):
        self.words = [w.encode() if isinstance(w, str) else w for w in words]
        self.vocab = len(words)

    def token_bytes(self, token):
        return self.words[token]

    def stream(self, *, start=True):
        from garrulax.hub.tokenizers import StreamDecoder

        return StreamDecoder(self, start=start)


def written(words, stop=(), order=None, ends=(), limit=99):
    writer = Writer(Words(*words), limit, ends, stop)
    shown = [writer.push([t], [0.0]) for t in (range(len(words)) if order is None else order)]
    return shown, writer


def test_what_may_be_a_stop_string_is_held_back():
    shown, writer = written(["a", "\n", "b", "\n", "\nc", "d"], stop=("\n\n",))
    assert shown == ["a", "", "\nb", "", "", ""]
    assert (writer.reason, len(writer.tokens)) == ("stop", 5)
    shown, writer = written(["one EN", "D EN", "DE"], stop=("ENDE", "ENDX"), limit=3)
    assert shown == ["one ", "END ", ""]
    assert writer.reason == "stop"
    shown, writer = written(["aab"], stop=("aab", "b", "ab"))  # the earliest cut wins
    assert writer.completion().text == ""


def test_what_was_held_back_is_shown_at_the_end():
    shown, writer = written(["x", "EN"], stop=("END",), limit=2)
    assert (shown, writer.completion().text, writer.reason) == (["x", "EN"], "xEN", "length")
    shown, writer = written(["x", "EN", "</s>"], stop=("END",), ends=(2,))
    assert (shown, writer.completion().text, writer.reason) == (["x", "", "EN"], "xEN", "eos")


def test_a_character_is_shown_whole():
    e, euro = "é".encode(), "€".encode()
    shown, writer = written([e[:1], e[1:] + euro[:1], euro[1:2], euro[2:], euro[:2]], limit=5)
    assert shown == ["", "é", "", "€", "\ufffd"]
    assert "".join(shown) == writer.completion().text


def test_rows_that_pad_the_embedding_have_no_text():
    shown, writer = written(["a", "b"], order=[0, 7, 1], limit=3)
    assert (shown, writer.completion().tokens) == (["a", "", "b"], [0, 7, 1])


def test_what_a_tokenizer_puts_around_a_prompt(bytes_model):
    same = {"max_new_tokens": 6, "temperature": 0}
    plain = gx.generate(bytes_model, "ab", **same)
    assert plain == gx.generate(bytes_model, [97, 98], **same)
    bytes_model.tokenizer.prefix, bytes_model.tokenizer.suffix = (256,), (257, 258)
    try:
        assert gx.generate(bytes_model, "ab", **same) == gx.generate(bytes_model, [256, 97, 98, 257, 258], **same)
        assert gx.generate(bytes_model, "", **same) == gx.generate(bytes_model, [256, 257, 258], **same)
    finally:
        bytes_model.tokenizer.prefix = bytes_model.tokenizer.suffix = ()


def test_one_prompt_gives_one_completion_and_a_list_a_list(bytes_model):
    short = {"max_new_tokens": 1}
    for alone in ("a", [97], (97,), np.array([97]), jnp.array([97])):
        assert isinstance(gx.generate(bytes_model, alone, **short), gx.Completion)
    for several in (["a"], [[97]], np.array([[97]]), [np.array([97])], ["a", [97]]):
        out = gx.generate(bytes_model, several, **short)
        assert isinstance(out, list)
        assert len(out) == len(several)


# -- Bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "there is no prompt": {"prompts": []},
    "a prompt is a text or a list of token ids, not None": {"prompts": None},
    "a prompt is a text or a list of token ids, not {'a': 1}": {"prompts": {"a": 1}},
    "a prompt is a text or a list of token ids, not 5": {"prompts": 5},
    "prompt 1 is to get at least min_new_tokens=9 and at most max_new_tokens=8 new tokens": {
        "prompts": ["a", "b"],
        "min_new_tokens": 9,
        "max_new_tokens": [10, 8],
    },
    "allowed_tokens=[] must be a list": {"allowed_tokens": []},
    "prompt 1 is empty": {"prompts": ["a", ""]},
    "prompt 0 is empty": {"prompts": [[]]},
    "prompt 0 has token id 264: this model's ids are 0 to 263": {"prompts": [1, 264]},
    "prompt 0 has token id -1": {"prompts": [-1]},
    "prompt 0 must be a text or a list of token ids": {"prompts": [[1.5]]},
    "prompt 0 has 90 tokens and 10 new ones are asked for, but the model's context is 96": {"prompts": "x" * 90},
    "max_new_tokens=0 must be": {"max_new_tokens": 0},
    "max_new_tokens=2.5 must be": {"max_new_tokens": 2.5},
    "temperature=-1 must be": {"temperature": -1},
    "temperature=nan must be": {"temperature": float("nan")},
    "temperature='hot' must be": {"temperature": "hot"},
    "top_k=-1 must be": {"top_k": -1},
    "top_k=True must be": {"top_k": True},
    "top_p=0 must be": {"top_p": 0},
    "top_p=1.1 must be": {"top_p": 1.1},
    "seed=-1 must be": {"seed": -1},
    "seed=4294967296 must be": {"seed": 2**32},
    "seed has 3 values for 1 prompts": {"seed": [1, 2, 3]},
    "stop must be a text or several": {"stop": ["a", ""]},
    "stop must be a text or several, not None": {"stop": None},
    "transform=5 must be": {"transform": 5},
    "there is no knob 'every'": {"every": 2},
    "negative_prompts has 2 prompts for 1": {
        "negative_prompts": ["a", "b"],
        "guidance_scale": 2,
        "search": gx.best_of(3),
    },
    "guidance_scale does not go with gx.contrastive": {"guidance_scale": 2, "search": gx.contrastive(2, 0.5)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(bytes_model, message):
    arguments = {"prompts": "a", "max_new_tokens": 10, **BAD[message]}
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}") as error:
        gx.generate(bytes_model, **arguments)
    assert "\n" not in str(error.value)


def test_bad_arguments_of_a_decoder_are_named(model):
    with pytest.raises(TypeError, match=r"transform=\[Transform.* make one of several by chain\(\.\.\.\)"):
        sampling.compile(model, [transforms.temperature()])
    decoder = sampling.compile(model)
    request = decoder.request([1] * 50, max_new_tokens=20)
    with pytest.raises(ValueError, match="a request may get 70 tokens, with its prompt, which is more than size=16"):
        decoder.prefill(model[0], request, size=16)
    with pytest.raises(ValueError, match="min_new_tokens=5 and at most max_new_tokens=4"):
        decoder.request([1], max_new_tokens=4, min_new_tokens=5)


def test_texts_need_a_tokenizer(bytes_model):
    model = (bytes_model.params, bytes_model.config)
    with pytest.raises(ValueError, match="no tokenizer: give token ids"):
        gx.generate(model, "a")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        gx.generate(model, [1], stop="x")
    with pytest.raises(TypeError, match=r"a model is what gx\.load returns"):
        gx.generate(bytes_model.params, "a")
    with pytest.raises(ValueError, match="stream takes one prompt"):
        gx.stream(bytes_model, ["a", "b"])
    with pytest.raises(ValueError, match="top_p"):
        gx.stream(bytes_model, "a", top_p=7)  # at the call, not at the first piece


def test_the_context_is_the_limit(model):
    params, config = model
    assert len(gx.generate((params, config), [1] * 90, max_new_tokens=6).tokens) == 6
    with pytest.raises(ValueError, match="the model's context is 96"):
        gx.generate((params, config), [1] * 90, max_new_tokens=7)


def test_parameters_that_are_not_finite_are_reported():
    config = tiny.SHALLOW["gpt"]
    broken = jax.tree.map(lambda x: x * jnp.nan, tiny.params(config))
    with pytest.raises(FloatingPointError, match="not finite"):
        gx.generate((broken, config), [1], max_new_tokens=2)


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 33)] == [1, 2, 4, 4, 8, 64]
    assert [bucket(n, least=16) for n in (1, 16, 17)] == [16, 16, 32]
