"""Blocks with keys and values in the memory of the host: the same numbers, and nothing moves that need not."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from test_caches import BLOCKS, LLAMA, TEXT, logits

import garrulax as gx
from garrulax.cli.caches import cache_of
from garrulax.layers import host_memory
from garrulax.layers.cache_kinds import FULL
from garrulax.sampling import Session, ahead, cache_rows, loop, state
from garrulax.sampling.decoder import Decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")
OFFLOAD = dataclasses.replace(BLOCKS, offload=True)


def with_dtype(dtype):
    return dataclasses.replace(BLOCKS, dtype=dtype), dataclasses.replace(OFFLOAD, dtype=dtype)


def assert_placed(cache):
    """Keys and values are on the host, and all else on the device."""
    layers = cache.layers if isinstance(cache.layers, tuple) else (cache.layers,)
    for name, x in ((name, x) for layer in layers for name, x in layer.items()):
        assert x.sharding.memory_kind == ("pinned_host" if name in ("key", "value") else "device"), name


@pytest.mark.parametrize(
    ("form", "dtype", "passes"),
    [
        ("stacked", None, [8]),
        ("unstacked", "int8", [1]),
        pytest.param("stacked", "int8", [3, 8], marks=pytest.mark.slow),
        pytest.param("unstacked", None, [8, 8, 1], marks=pytest.mark.slow),
    ],
)
def test_logits_are_the_same_to_the_last_bit(form, dtype, passes):
    params = tiny.params(LLAMA) if form == "stacked" else gx.unstack(tiny.params(LLAMA))
    wanted, found = (logits(params, LLAMA, TEXT, kind, passes) for kind in with_dtype(dtype))
    np.testing.assert_array_equal(found, wanted)


def assert_same_texts(dtype, *ways):
    model = tiny.params(LLAMA), LLAMA
    for way in ways:
        wanted, found = (gx.generate(model, cache=kind, max_new_tokens=40, **way) for kind in with_dtype(dtype))
        for one, other in zip(*((x if isinstance(x, list) else [x]) for x in (wanted, found)), strict=True):
            assert one.tokens == other.tokens
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)


@pytest.mark.slow
def test_texts_of_long_and_short_prompts_are_the_same():
    assert_same_texts(None, {"prompts": [TEXT * 2, TEXT[:5], TEXT[:30]], "seed": [1, 2, 3]})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_texts_of_several_samples_and_with_guidance_are_the_same(dtype):
    ways = {"search": gx.best_of(3)}, {"guidance_scale": 1.5}
    assert_same_texts(dtype, *({"prompts": TEXT, **way} for way in ways))


@pytest.mark.slow
def test_a_session_keeps_it_on_the_host():
    model, draw = (tiny.params(LLAMA), LLAMA), np.random.default_rng(6)
    sessions, prompt = [Session(model, kind) for kind in (BLOCKS, OFFLOAD)], TEXT
    for turn in range(3):
        wanted, found = (tiny.drained(s.stream(prompt, max_new_tokens=12, seed=turn))[1] for s in sessions)
        assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
        assert_placed(sessions[1]._kept.cache)
        prompt = [*prompt, *found.tokens[: -1 if turn % 2 else -5], *draw.integers(0, 61, 20).tolist()]
    assert sessions[1].reused == sessions[0].reused > 60


@pytest.mark.parametrize(("rows", "form"), [(2, "unstacked"), pytest.param(1, "stacked", marks=pytest.mark.slow)])
def test_a_step_writes_in_place_and_every_change_of_a_state_leaves_it_there(rows, form):
    slots, stacked = 4096, tiny.params(LLAMA)
    params, decoder = gx.unstack(stacked) if form == "unstacked" else stacked, Decoder(LLAMA, cache=OFFLOAD)
    prefix = decoder.prefill(stacked, decoder.request(TEXT, max_new_tokens=8, temperature=0), slots)
    before = decoder.insert(decoder.empty(params, prefix, rows, slots), prefix, rows - 1)
    options = {"config": LLAMA, "transform": decoder.transform}
    program = loop.decode_steps.lower(params, before, np.int32(3), **options).compile()
    key = rows * LLAMA.kv_heads * slots * LLAMA.head_dim * 4  # bytes of the keys of a layer
    assert program.memory_analysis().temp_size_in_bytes < key
    assert program.memory_analysis().alias_size_in_bytes > 2 * LLAMA.layers * key
    assert not re.search(rf"f32\[[\d,]*{slots},{LLAMA.head_dim}\]\S* copy\(", program.as_text())
    after = decoder.step(params, before, 5)
    assert before.cache.layers[0]["key"].is_deleted() if form == "unstacked" else True
    assert after.generated.tolist() == [0] * (rows - 1) + [5]
    grown = state.grow(decoder.evict(after, np.zeros(rows, bool)), slots + 8)
    for one in (prefix, after, grown):
        assert_placed(one.cache)
    for as_stack in (True, False):
        row = state.extract(grown, rows - 1, as_stack)
        assert_placed(cache_rows.grow_cache(row, slots + 16))
        kept = row.layers["key"][1, 0] if as_stack else row.layers[1]["key"]
        whole = grown.cache.layers[1]["key"] if form == "unstacked" else grown.cache.layers["key"][1]
        wanted = np.asarray(whole).reshape(rows, LLAMA.kv_heads, -1, LLAMA.head_dim)[rows - 1]
        np.testing.assert_array_equal(np.asarray(kept), wanted)


@pytest.mark.slow
def test_programs_are_compiled_ahead_for_arrays_on_the_host():
    gx.generate((tiny.params(LLAMA), LLAMA), TEXT, max_new_tokens=8, cache=dataclasses.replace(OFFLOAD, top=3))
    programs = [program.result() for program in list(ahead._programs.values())[-2:]]
    kinds = {x.memory_kind for one in programs for x in jax.tree.leaves(one.input_shardings)}
    assert kinds == {"device", "pinned_host"}


def test_what_cannot_be_offloaded_is_refused(monkeypatch):
    def chosen(cache, offload=True, kv=None):
        return cache_of(SimpleNamespace(cache=cache, kv=kv, offload=offload), LLAMA)

    assert chosen("blocks=4,2,2,8,2", kv="int8") == gx.blocks(4, 2, 2, 8, 2, dtype="int8", offload=True)
    assert chosen("blocks", offload=False) == gx.blocks()
    for text in ("full", "sinks=4,20"):
        with pytest.raises(ValueError, match=f"--offload .* goes with --cache blocks, not {text}"):
            chosen(text)
    with pytest.raises(ValueError, match="offload=1 must be true or false"):
        gx.blocks(offload=1)
    with pytest.raises(TypeError, match="offload"):
        gx.window(8, offload=True)
    assert FULL.on_host == ()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for compiles, message in ((True, "heads of 4 entries: on a TPU"), (False, "does not compile it for TPUs")):
        monkeypatch.setattr(host_memory, "COMPILES_FOR_TPUS", compiles)
        with pytest.raises(ValueError, match=message):
            gx.generate((tiny.params(LLAMA), LLAMA), TEXT, max_new_tokens=4, cache=OFFLOAD)
