"""Compiled programs on disk, which the next process finds without tracing, and the first step on zeros."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

import garrulax as gx
from garrulax import sampling
from garrulax.core.described import NotDescribable, describe, describe_tree
from garrulax.sampling import ahead, loop, programs, start, state, transforms

pytestmark = pytest.mark.usefixtures("quick_compilation")
LLAMA = dataclasses.replace(tiny.CONFIGS["llama"], layers=1)
KNOBS = {"max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "seed": 3}


@pytest.fixture(name="folder")
def _folder(tmp_path, monkeypatch):
    """The folder in which the programs of a test are kept, by JAX too."""
    settings = {"compilation_cache_dir": str(tmp_path), "enable_compilation_cache": True,
                "persistent_cache_min_compile_time_secs": 0, "persistent_cache_min_entry_size_bytes": -1}  # fmt: skip
    before = {f"jax_{name}": jax.config.values[f"jax_{name}"] for name in settings}
    for name, value in settings.items():
        jax.config.update(f"jax_{name}", value)
    compilation_cache.reset_cache()
    end_process(monkeypatch)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()


def kept(folder):
    """The files of our programs."""
    return sorted(folder.glob(f"*{programs.ENDING}"))


def forget_those_of_jax(folder):
    """Removes the programs that JAX has kept itself."""
    for file in folder.glob("*-cache"):
        file.unlink()


@pytest.fixture(name="compiled")
def _compiled(monkeypatch):
    """What is compiled ahead, in its order: a list that grows."""
    compiled, compile_ = [], jax.stages.Lowered.compile

    def recording(lowered, **options):
        compiled.append(lowered.in_tree)
        return compile_(lowered, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", recording)
    return compiled


def end_process(monkeypatch):
    """Forgets the programs that this process has compiled, after those that are being written are written."""
    ahead._pool.shutdown()
    jax.clear_caches()
    ahead._pool = type(ahead._pool)(3)
    monkeypatch.setattr(ahead, "_programs", {})


def write(model, **knobs):
    done = gx.generate(model, [5, 3, 8], **{**KNOBS, **knobs})
    return done.tokens, done.logprobs


def test_the_next_process_compiles_nothing(folder, compiled, monkeypatch):
    model = tiny.params(LLAMA), LLAMA
    wanted = write(model)
    end_process(monkeypatch)
    forget_those_of_jax(folder)
    files = kept(folder)
    assert [file.name.partition("-")[0] for file in files] == ["decode_steps", "prefill"]
    assert len(compiled) == 2
    assert write(model) == wanted  # to the last bit
    assert write(model, temperature=0)[0] != wanted[0]  # knobs are arguments
    assert len(compiled) == 2
    assert (state.prefill._cache_size(), loop.decode_steps._cache_size()) == (0, 0), "compiled by the call"

    for file in files:  # half a file is a program that is not there
        file.write_bytes(file.read_bytes()[:1000])
    end_process(monkeypatch)
    forget_those_of_jax(folder)
    assert write(model) == wanted
    assert len(compiled) == 4
    end_process(monkeypatch)
    assert min(file.stat().st_size for file in files) > 1000


def test_what_is_found_in_the_cache_of_jax_is_not_written(folder, compiled, monkeypatch):
    """XLA:CPU cannot serialise such a program: what is read back lacks functions."""
    model = tiny.params(LLAMA), LLAMA
    wanted = write(model)
    end_process(monkeypatch)
    for again in range(2):  # from the files of JAX, and from its memory
        for file in kept(folder):
            file.unlink()
        assert write(model) == wanted
        if not again:
            ahead._pool.shutdown()
            ahead._pool = type(ahead._pool)(3)
            monkeypatch.setattr(ahead, "_programs", {})
    end_process(monkeypatch)
    assert len(compiled) == 6
    assert not kept(folder)


def test_the_state_is_donated_to_a_program_from_disk(folder, monkeypatch):
    params = tiny.params(LLAMA)
    decoder, unstacked = sampling.compile((params, LLAMA)), gx.unstack(params)
    one = decoder.request([5, 3, 8], **KNOBS)
    for _ in range(2):
        like = jax.eval_shape(lambda: decoder.prefill(params, one, 256))
        begun = decoder.insert(decoder.empty(unstacked, like, 2, 256), decoder.prefill(params, one, 256), 0)
        ahead.compile_ahead(loop.decode_steps, unstacked, begun, np.int32(1), config=LLAMA, transform=decoder.transform)
        assert isinstance(decoder.program(unstacked, begun), jax.stages.Compiled)
        after = decoder.step(unstacked, begun, 2)
        assert after.generated.tolist() == [2, 0]
        assert begun.cache.layers[0]["key"].is_deleted()
        end_process(monkeypatch)


def test_a_transform_of_the_user_is_not_kept(folder, monkeypatch):
    bias = transforms.Transform(lambda knobs: (), lambda logits, state: (logits.at[:, 7].add(100.0), state))
    chain = transforms.chain(bias, transforms.DEFAULT)
    assert set(write((tiny.params(LLAMA), LLAMA), transform=chain)[0]) == {7}
    end_process(monkeypatch)
    assert not kept(folder)


def test_what_a_program_depends_on_is_in_its_name(folder):
    device = jax.devices()[0]
    args, static = (jax.ShapeDtypeStruct((2,), np.float32),), {"config": LLAMA, "transform": transforms.DEFAULT}

    def file(args=args, static=static, options=None):
        return programs.file_of(loop.decode_steps, args, static, options, device)

    chain = transforms.chain(transforms.only(7, ()), transforms.DEFAULT)
    others = [
        file(args=(jax.ShapeDtypeStruct((3,), np.float32),)),
        file(args=(jax.ShapeDtypeStruct((2,), np.int32),)),
        file(args=({"x": args[0]},)),
        file(static={**static, "transform": chain}),
        file(static={**static, "transform": transforms.chain(transforms.only(8, ()), transforms.DEFAULT)}),
        file(static={**static, "config": tiny.CONFIGS["gpt"]}),
        file(options={"xla_gpu_dot_merger_threshold_mb": 512}),
    ]
    with jax.debug_nans(True):
        others.append(file())
    assert len({file(), *others}) == len(others) + 1
    assert file() == file()


def test_names_are_the_same_in_every_process():
    chain = "transforms.standard_chain(['min_p', 'watermark', 'bad_words_ids'])"
    code = f"print(describe((loop.decode_steps, {chain}, {{'a', 'b'}})))"
    imports = "from garrulax.core.described import describe\nfrom garrulax.sampling import loop, transforms\n"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    words = [sys.executable, "-c", imports + code]
    there = subprocess.run(words, env=environment, capture_output=True, check=True, text=True).stdout
    here = transforms.standard_chain(["min_p", "watermark", "bad_words_ids"])
    assert there.strip() == describe((loop.decode_steps, here, {"a", "b"}))


def test_descriptions():
    assert describe((1, True, 1.0)) == "builtins.tuple(int(1), bool(True), float(1.0))"
    assert describe(np.float32) != describe(np.dtype("float32"))
    assert describe({"a": None}) == "dict(str('a'): None)"
    trees = [(1, None), (None, 1), [1, None], {"a": 1, "b": None}, {"a": 1, "c": None}]
    assert len({describe_tree(jax.tree.structure(tree)) for tree in trees}) == len(trees)
    for value in (lambda x: x, tiny.Model, object(), {"a": [test_descriptions]}, jnp.ones(1)):
        with pytest.raises(NotDescribable):
            describe(value)


def test_the_first_step_is_taken_on_zeros_while_weights_are_read(monkeypatch):
    params, steps = tiny.params(LLAMA), []
    wanted = write((params, LLAMA))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    monkeypatch.setattr(ahead, "_programs", {})
    program = sampling.Decoder.program

    def recording(decoder, weights, before):
        found = program(decoder, weights, before)
        steps.append(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(weights)))
        return found

    monkeypatch.setattr(sampling.Decoder, "program", recording)
    sampling.compile_ahead((abstract, LLAMA), [5, 3, 8], **KNOBS)
    end_process(monkeypatch)
    assert steps == [0]
    assert write((params, LLAMA)) == wanted
    assert len(steps) == 2
    assert steps[1] > 0
    monkeypatch.setattr(start, "MOST_SLOTS_ON_ZEROS", 1)  # as if the prompt were long
    sampling.compile_ahead((abstract, LLAMA), [5, 3, 8], **KNOBS)
    end_process(monkeypatch)
    assert len(steps) == 2
    zeros = start._zeros({"a": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), "b": jax.ShapeDtypeStruct((), bool)})
    assert zeros["a"].dtype == jnp.bfloat16
    assert not zeros["a"].any()
    assert zeros["b"].shape == ()
