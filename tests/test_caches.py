"""Caches of windows, sinks, blocks and int8: against formulas in float64 over the keys that are kept."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import kept_reference
import numpy as np
import pytest
import tiny

import garrulax as gx
from garrulax import models, sampling
from garrulax.layers import quantised
from garrulax.layers.cache_kinds import FULL, Blocks, Full, LayerWindows, Sinks, Window
from garrulax.layers.rope import Rope
from garrulax.sampling import Session, state
from garrulax.sampling.generate import make_plan

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZES = {"vocab": 61, "width": 16, "layers": 2, "heads": 4, "eos": None, "init_std": 0.4}
LLAMA = gx.preset("llama-tiny", **SIZES, kv_heads=2, mlp_width=24, context=64)
ALIBI = dataclasses.replace(LLAMA, positions="alibi", dialect="baichuan", kv_heads=4)
FALCON = gx.preset("falcon-7b", **SIZES, kv_heads=1, alibi=True, context=64)
NEO = gx.preset(
    "gpt2", **SIZES | {"layers": 3}, context=64, band=9, band_parity=0, qkv_bias=False, scale_attention=False
)
QWEN = dataclasses.replace(LLAMA, layers=3, dialect="qwen2", qkv_bias=True, window=9, window_from=1)
TEXT = np.random.default_rng(0).integers(0, 61, 40).tolist()


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, tokens, cache, config):
    return gx.forward(params, tokens, config, cache=cache)


def logits(params, config, tokens, kind, passes, size=None):
    """Logits [T, V] of a text that is read in passes of some lengths, the last of which repeats."""
    cache, parts = models.cache_for(params, config, 1, size or len(tokens), kind=kind), []
    while tokens:
        count = min(passes[0], len(tokens))
        passes = passes[1:] or passes
        part, cache = _forward(params, jnp.array([tokens[:count]], jnp.int32), cache, config)
        tokens = tokens[count:]
        parts.append(part[0])
    return np.concatenate(parts)


def assert_close(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


BLOCKS = Blocks(size=4, top=2, first=2, local=8, representatives=2, chunk=8)
KINDS = {
    "window": (Window(9, chunk=8), kept_reference.window(9), False),
    "sinks": (Sinks(3, 9, chunk=8), kept_reference.sinks(3, 9), True),
    "blocks": (BLOCKS, kept_reference.blocks(BLOCKS), True),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_kept_is_attended_to_as_in_a_dense_formula(name):
    kind, chosen, counted = KINDS[name]
    params = tiny.params(LLAMA)
    wanted = kept_reference.logits(params, LLAMA, TEXT, chosen, counted)
    assert_close(logits(params, LLAMA, TEXT, kind, [8]), wanted)


@pytest.mark.parametrize(("config", "unstacked"), [(NEO, False), (QWEN, True)], ids=["gpt-neo", "qwen2"])
def test_where_some_layers_have_a_window_they_alone_forget(config, unstacked):
    """Against a pass without a cache, whose masks are those of the family."""
    params, kind = tiny.params(config), models.default_cache(config)
    assert kind.windowed == ((True, False, True) if config is NEO else (False, True, True))
    wanted = gx.forward(params, jnp.array([TEXT]), config)[0][0]
    params = gx.unstack(params) if unstacked else params
    small = dataclasses.replace(kind, window=dataclasses.replace(kind.window, chunk=8))
    assert_close(logits(params, config, TEXT, small, [8, 3, 1, 8]), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("config", [LLAMA, ALIBI, FALCON], ids=["llama", "alibi", "falcon"])
def test_of_every_family_and_in_passes_of_all_sizes(name, config):
    kind, chosen, counted = KINDS[name]
    params = tiny.params(config)
    wanted = kept_reference.logits(params, config, TEXT, chosen, counted)
    assert_close(logits(params, config, TEXT, kind, [3, 8]), wanted)
    assert_close(logits(gx.unstack(params), config, TEXT, kind, [1]), wanted)
    full = logits(params, config, TEXT, FULL, [len(TEXT)])
    assert np.abs(full - wanted)[20:].max() > 0.01  # leaving tokens out matters


def test_a_window_of_the_whole_text_equals_a_full_cache_to_the_last_bit():
    one, T = dataclasses.replace(LLAMA, layers=1), len(TEXT)
    params = gx.unstack(tiny.params(one))
    found = logits(params, one, TEXT, Window(T, chunk=1), [1], size=T)
    np.testing.assert_array_equal(found, logits(params, one, TEXT, FULL, [1]))


@pytest.mark.slow
def test_with_room_for_all_they_equal_a_full_cache():
    params = gx.unstack(tiny.params(LLAMA))
    full = logits(params, LLAMA, TEXT, FULL, [1])
    for kind in (Sinks(4, len(TEXT) - 4), Blocks(size=4, top=8, first=4, local=4)):  # as many blocks as there are
        assert_close(logits(params, LLAMA, TEXT, kind, [1]), full, 1e-5)


@pytest.mark.slow
def test_int8_is_near_to_what_is_kept_exactly():
    params, T = gx.unstack(tiny.params(LLAMA)), len(TEXT)
    exact, full = (logits(params, LLAMA, TEXT, Full(dtype=dtype), [1]) for dtype in (None, "int8"))
    assert 1e-4 < np.abs(full - exact).max() / np.abs(exact).max() < 0.03
    same = logits(params, LLAMA, TEXT, Window(T, chunk=1, dtype="int8"), [1], size=T)
    np.testing.assert_array_equal(same, full)
    for kind in (Window(9), Sinks(3, 9), dataclasses.replace(BLOCKS, top=8)):
        small = dataclasses.replace(kind, dtype="int8")
        assert_close(logits(params, LLAMA, TEXT, small, [7]), logits(params, LLAMA, TEXT, kind, [7]), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_family_can_have_a_cache_of_int8(family):
    config = tiny.CONFIGS[family]
    params, tokens = tiny.params(config), TEXT[:12]
    full, small = (logits(params, config, tokens, Full(dtype=dtype), [6]) for dtype in (None, "int8"))
    assert 0 < np.abs(small - full).max() / np.abs(full).max() < 0.1


def test_int8_is_off_by_half_a_scale_at_most():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 5, 8)) * 10, jnp.float32).at[0, 0, 0].set(0)
    kept = quantised.store("key", x)
    assert kept["key"].dtype == jnp.int8
    error = np.abs(quantised.restore(kept["key"], kept["key_scale"], jnp.float32) - x)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert (error <= largest / 254 * 1.0001).all()
    assert error.max() > 0.01


def test_memory_is_that_of_what_is_kept():
    def mib(kind, size):
        params = jax.eval_shape(lambda: tiny.params(config))
        cache = jax.eval_shape(lambda: models.cache_for(params, config, 1, size, kind=kind))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers)) / 2**20

    config = gx.preset("mistral-7b", layers=2)
    assert mib(FULL, 2**15) == 2 * 2 * 8 * 128 * 4 * 2**15 / 2**20  # layers, key and value, heads, width, float32
    assert mib(Full(dtype="int8"), 2**15) == mib(FULL, 2**15) * (128 + 4) / 512
    assert mib(models.default_cache(config), 2**15) == mib(FULL, 4096 + 128)
    assert mib(Sinks(4, 1020), 10**6) == mib(FULL, 1024 + 128)
    assert models.default_cache(gx.preset("qwen2-7b")) == FULL
    config = gx.preset("gpt3-125m")  # every second layer has a window of 256 tokens
    assert mib(FULL, 2048) == 12 * 2 * 12 * 64 * 4 * 2048 / 2**20
    assert mib(models.default_cache(config), 2048) == mib(FULL, 2048) / 2 + mib(FULL, 256 + 128) / 2
    assert mib(models.default_cache(config, "int8"), 2048) == mib(models.default_cache(config), 2048) * (64 + 4) / 256


@pytest.mark.slow
def test_models_with_a_window_have_a_small_cache_by_default(monkeypatch):
    sizes = []
    insert = state.insert
    monkeypatch.setattr(state, "insert", lambda into, *rest: sizes.append(into.cache.size) or insert(into, *rest))
    config = dataclasses.replace(LLAMA, window=20, context=1024, dialect="mistral")
    params = gx.unstack(tiny.params(config))
    done = gx.generate((params, config), TEXT, max_new_tokens=240, temperature=0)
    assert sizes == [20 + 128]  # and all 280 tokens in a full cache
    monkeypatch.setattr(models, "default_cache", lambda *_: FULL)
    whole = gx.generate((params, config), TEXT, max_new_tokens=240, temperature=0)
    assert sizes[1:] == [256]
    assert done.tokens == whole.tokens


@pytest.mark.slow
@pytest.mark.parametrize("config", [NEO, QWEN], ids=["gpt-neo", "qwen2"])
@pytest.mark.parametrize("stacked", [False, True], ids=["unstacked", "stacked"])
def test_texts_are_the_same_with_windows_in_some_layers(config, stacked, monkeypatch):
    config = dataclasses.replace(config, context=512)
    params = tiny.params(config)
    model = (params if stacked else gx.unstack(params)), config
    assert isinstance(make_plan(model, [TEXT], 300).decoder.cache, LayerWindows)
    prompts, settings = [TEXT * 5, TEXT[:7]], {"max_new_tokens": 90, "temperature": 0.8, "seed": [3, 4]}
    guided = {"negative_prompts": TEXT[:9], "guidance_scale": 1.5}

    def written():
        session, text, turns = Session(model), TEXT[:30], []
        for turn in range(4):
            _, done = tiny.drained(session.stream(text, max_new_tokens=60, temperature=0))
            turns.append((done.tokens, session.reused))
            text = [*text, *done.tokens[: -1 if turn % 2 else -5], *TEXT[:9]]
        return (
            [one.tokens for one in gx.generate(model, prompts, **settings)],
            [
                gx.generate(model, one, **settings | {"seed": seed}).tokens
                for one, seed in zip(prompts, (3, 4), strict=True)
            ],
            gx.generate(model, TEXT * 4, max_new_tokens=60, search=gx.best_of(3)).tokens,
            gx.generate(model, TEXT * 4, max_new_tokens=60, temperature=0, **guided).tokens,
            turns,
        )

    found = written()
    monkeypatch.setattr(models, "default_cache", lambda *_: FULL)
    assert found == written()


@pytest.mark.parametrize(
    ("kind", "message"), [(BLOCKS, "a request may get 70 tokens, with its"), (Sinks(4, 20), "a prompt has 40 tokens")]
)
def test_a_row_has_space_for_its_request_or_is_a_ring(kind, message):
    decoder = sampling.compile((tiny.params(LLAMA), LLAMA), cache=kind)
    with pytest.raises(ValueError, match=f"{message}.* more than size=32: raise size"):
        decoder.prefill(tiny.params(LLAMA), decoder.request(TEXT, max_new_tokens=30), size=32)


@pytest.mark.slow
def test_transforms_see_the_last_tokens_of_a_text_without_an_end():
    session = Session((tiny.params(LLAMA), LLAMA), Sinks(4, 40))  # the session's size is 256
    knobs = {"temperature": 5.0, "no_repeat_ngram_size": 2, "max_new_tokens": 400}
    prompt = TEXT
    for seed in range(2):
        text = [*prompt, *tiny.drained(session.stream(prompt, seed=seed, **knobs))[1].tokens]
        for end in range(len(prompt) + 10, len(text), 10):
            pairs = list(itertools.pairwise(text[:end][-256:]))[-10:]
            assert not set(pairs) & set(itertools.pairwise(text[: end - 10][-246:])), end
        prompt = [*text, 5]


@pytest.mark.slow
def test_texts_go_on_beyond_the_context():
    model = gx.unstack(tiny.params(LLAMA)), LLAMA
    kind = Sinks(2, 30, chunk=16)
    prompt = TEXT * 2  # 80 tokens; the context has 64
    done = gx.generate(model, prompt, max_new_tokens=100, temperature=0, cache=kind)
    step = logits(model[0], LLAMA, [*prompt, *done.tokens], kind, [1])[79:-1]
    assert done.tokens == step.argmax(axis=1).tolist()  # read in passes, written beyond the slots
    pieces = gx.stream(model, prompt, max_new_tokens=100, temperature=0, cache=kind, every=50)
    assert tiny.drained(pieces)[1].tokens == done.tokens  # the state keeps the last 48 new tokens only


@pytest.mark.slow
def test_a_session_goes_on_and_is_shortened():
    model, prompt = (gx.unstack(tiny.params(LLAMA)), LLAMA), TEXT[:10]
    kind = gx.sinks(2, 30)
    session, draw = Session(model, kind), np.random.default_rng(6)
    for turn in range(6):
        _, done = tiny.drained(session.stream(prompt, max_new_tokens=8, temperature=0))
        wanted = gx.generate(model, prompt, max_new_tokens=8, temperature=0, cache=kind)
        assert done.tokens == wanted.tokens
        assert session.reused >= (0 if turn == 0 else len(prompt) - 9)
        prompt = [*prompt, *done.tokens[: -1 if turn % 2 else -5], *TEXT[:9]]  # some are taken back
    assert len(prompt) > LLAMA.context
    for size, reused in ((30, 20), (120, 24), (15, 0)):  # then the ring has lost the beginning
        prompt = [*prompt[: reused or 10], *draw.integers(0, 61, size).tolist()]
        _, done = tiny.drained(session.stream(prompt, max_new_tokens=60, temperature=0))
        wanted = gx.generate(model, prompt, max_new_tokens=60, temperature=0, cache=kind)
        assert (done.tokens, session.reused) == (wanted.tokens, reused)


def test_what_cannot_be_is_refused_before_anything_is_compiled():
    def refused(message, config=LLAMA, error=ValueError, **arguments):
        params = jax.eval_shape(lambda: tiny.params(config))
        with pytest.raises(error, match=message):
            make_plan((params, config), [[1, 2, 3]], **{"max_new_tokens": 4} | arguments)

    with pytest.raises(ValueError, match=r"sinks\(8, 4\): the window of 4 tokens is smaller than the 8 sinks"):
        gx.sinks(8, 4)
    with pytest.raises(ValueError, match="dtype='int4' must be None"):
        gx.window(8, dtype="int4")
    with pytest.raises(ValueError, match="local=100 must be a multiple of the size 128"):
        gx.blocks(local=100)
    with pytest.raises(ValueError, match="size=0 must be a whole number of at least 1"):
        gx.window(0)
    with pytest.raises(ValueError, match="a pass of 8 tokens is too long for a cache of kind 'sinks'"):
        logits(tiny.params(LLAMA), LLAMA, TEXT, Sinks(2, 8, chunk=7), [8])
    plan = make_plan((jax.eval_shape(lambda: tiny.params(LLAMA)), LLAMA), [[1, 2]], 4, cache=gx.window(2**40))
    assert plan.decoder.cache == FULL  # not 2**40 slots for six tokens
    for other in (LLAMA, dataclasses.replace(QWEN, window_from=2), dataclasses.replace(QWEN, window=10)):
        refused("must have the windows of the model's layers", other, cache=models.default_cache(QWEN))
    refused("'blocks' with 6,399 positions is larger than the model's context of 64", cache=gx.blocks())
    refused("'sinks' with 104 positions is larger than the model's context of 64", cache=gx.sinks(4, 100))
    refused("no text may have more than 1,073,741,824", cache=gx.sinks(4, 8), max_new_tokens=2**31 - 1)
    refused("cache='ring' must be 'full', 'int8', gx.window", cache="ring")
    refused("cache=7 must be", error=TypeError, cache=7)
    refused("cache=window does not go with search", cache=gx.window(8), search=gx.beam(2))
    refused("cache=int8 does not go with search", cache="int8", search=gx.beam(2))
    refused("gpt has learned positions.* use gx.window", tiny.CONFIGS["gpt"], cache=gx.sinks(2, 4))
    refused("glm fills blanks.* use 'full'", tiny.CONFIGS["glm"], cache=gx.window(4))
    with pytest.raises(ValueError, match="fill has no argument 'cache': it keeps the whole text"):
        gx.fill(({}, tiny.CONFIGS["glm"]), [1, 2], cache=gx.window(4))


def needle_model():
    """One layer whose weights find needles: token 16 k + v holds the value v under the key k, 256 + k asks for k.

    The answer to 256 + k is the token 272 + v. Tokens from 288 on are filler, which looks weakly for any key.
    """
    config = gx.preset(
        "llama-tiny", vocab=320, context=32, width=80, layers=1, heads=2, kv_heads=1, head_dim=64, mlp_width=8,
        tied=False, eos=None, rope=Rope(theta=1e9),
    )  # fmt: skip
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(lambda: tiny.params(config)))
    one, places = np.eye(16, dtype=np.float32), [slice(16 * i, 16 * i + 16) for i in range(5)]
    held, value, asked, answer, filler = places  # parts of the hidden state
    params["tokens"][:256, held] = np.repeat(one, 16, axis=0)
    params["tokens"][:256, value] = np.tile(one, (16, 1))
    params["tokens"][256:272, asked] = one
    params["tokens"][288:, filler] = np.random.default_rng(2).random((32, 16))
    params["head"][272:288, answer] = one
    attention = params["blocks"]["attention"]
    attention["key"][0, held, 0, 16:32] = one  # entries that the rotary embedding hardly turns
    attention["query"][0, asked, :, 16:32] = 30 * one[:, None]
    attention["query"][0, filler, :, 16:32] = 0.1 * np.random.default_rng(3).random((16, 1, 16))
    attention["value"][0, value, 0, :16] = one
    attention["out"][0, :, :16, answer] = one[:, None].swapaxes(0, 1)
    for name in ("attention_norm", "mlp_norm"):
        params["blocks"][name]["scale"][:] = 1
    params["norm"]["scale"][:] = 1
    return params, config


@pytest.mark.slow
def test_a_needle_is_found_at_64_times_the_context():
    model, draw = needle_model(), np.random.default_rng(4)
    keys, values = draw.permutation(16)[:4], draw.integers(0, 16, 4)
    text = draw.integers(288, 320, 64 * 32)
    text[np.arange(4) * 500 + 100] = 16 * keys + values
    prompts = [[*text.tolist(), 256 + int(key)] for key in keys]

    def right(kind):
        done = gx.generate(model, prompts, max_new_tokens=1, temperature=0, cache=kind)
        return sum(one.tokens[0] == 272 + value for one, value in zip(done, values, strict=True))

    assert right(gx.blocks(4, 1, 2, 16, 1)) == 4  # each query looks up one of 508 blocks
    assert right(gx.sinks(4, 28)) < 4
