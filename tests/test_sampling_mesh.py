"""Sampling and scoring with parameters on eight devices: the tokens and log-probabilities of one device."""

import dataclasses

import jax
import numpy as np
import pytest
import registry

import garrulax as gx
from garrulax import models
from garrulax.cli import main
from garrulax.core.auto_mesh import using
from garrulax.core.collectives import collectives
from garrulax.core.sharding import make_mesh, place
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.sampling import loop, state
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.requests import prepare_model
from garrulax.sampling.session import Session

pytestmark = pytest.mark.usefixtures("quick_compilation")
MESHES = ("data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2")
CASES = [pytest.param(f, mesh, 2, marks=pytest.mark.slow) for f in ("llama", "gpt", "glm") for mesh in MESHES]
CASES.append(pytest.param("llama", MESHES[0], 1))
IDS = {"glm": {"cls": 31}}  # within the vocabulary
PROMPTS = [[5, 17, 30, 9], [11, 60, 3, 8, 21], [40, 41, 42, 43], [7, 7, 9, 70, 12]]
RAGGED = [*PROMPTS, [13]]
PREFILL = Decoder.prefill


def one_and_many(family, mesh, strategy="fsdp+tp", **changes):
    """The same model on one device and on a mesh."""
    config = dataclasses.replace(registry.FAMILIES[family].sharded, **changes)
    params = gx.init(config, jax.random.key(1))
    return (params, config), (place(params, models.parameters(config), make_mesh(mesh), strategy), config)


def assert_same(one, many):
    assert [x.tokens for x in one] == [x.tokens for x in many]
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize(("family", "mesh", "layers"), CASES)
def test_completions_are_those_of_one_device(family, mesh, layers, monkeypatch):
    """Of ragged prompts, some greedy and some sampled, which are read together; three rows of the state stay free."""
    options = {
        "end_tokens": (), "max_new_tokens": [6, 4, 6, 5, 2], "temperature": [0, 1, 0.8, 1, 1],
        "top_p": [1, 1, 0.9, 1, 0.8], "seed": [1, 2, 3, 4, 5],
    }  # fmt: skip
    one, many = one_and_many(family, mesh, layers=layers)
    read = []

    def prefill(self, params, requests, *rest):
        read.append(len(requests.context))
        return PREFILL(self, params, requests, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "prefill", prefill)
        found = gx.generate(many, RAGGED, **options)
    assert read == [8]
    assert jax.sharding.get_abstract_mesh().empty  # the call's mesh is gone
    assert_same(gx.generate(one, RAGGED, **options), found)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp+tp", "hsdp"])
def test_one_prompt_is_continued_as_on_one_device(strategy):
    """No axis divides its row. The caller's own mesh does not matter."""
    one, many = one_and_many("llama", MESHES[0], strategy)
    options = {"max_new_tokens": 4, "temperature": 1, "seed": 2, "end_tokens": ()}
    with jax.set_mesh(make_mesh(MESHES[0])):
        found = gx.generate(many, PROMPTS[1], **options)
    assert_same([gx.generate(one, PROMPTS[1], **options)], [found])


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt", "glm"))])
def test_scores_are_those_of_one_device(family):
    one, many = (
        gx.score(model, PROMPTS[1::2]) for model in one_and_many(family, MESHES[0], layers=1, **IDS.get(family, {}))
    )
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.logprobs[1:], b.logprobs[1:], atol=1e-5)


@pytest.mark.slow
def test_a_session_and_a_filled_blank_are_those_of_one_device():
    answers = []
    for model in one_and_many("llama", MESHES[1], window=0):
        session = Session(model)
        options = {"max_new_tokens": 4, "temperature": 0, "end_tokens": (), "every": 2}
        list(session.stream([5, 17, 30, 9], **options))
        first = session.read
        list(session.stream([*first, 8, 9], **options))
        answers.append((first, session.read, session.reused))
    assert answers[0] == answers[1]
    filled = []
    for params, config in one_and_many("glm", MESHES[1], **IDS["glm"]):
        text = [config.cls, 5, config.mask, 6, config.mask, config.eos]
        filled.append(gx.fill((params, config), text, max_new_tokens=3, temperature=1, seed=3).tokens)
    assert filled[0] == filled[1]


@pytest.mark.slow
def test_weights_and_caches_stay_where_they_are():
    """A step moves activations and logits: no collective is as large as a device's part of a matrix or of a cache."""
    rows, slots = 4, 1024
    _, (params, config) = one_and_many("llama", MESHES[1], context=slots, width=128, mlp_width=256)
    weights, _, _ = prepare_model((params, config))
    decoder = Decoder(config)
    with jax.set_mesh(weights.mesh):
        prefix = decoder.prefill(weights.prefill, decoder.request([1, 2, 3], max_new_tokens=8), 16)
        before = decoder.insert(decoder.empty(weights.step, prefix, rows, slots), prefix, 1)
        static = {"config": config, "transform": decoder.transform}
        text = loop.decode_steps.lower(weights.step, before, np.int32(4), **static).compile().as_text()
    key, up = before.cache.layers[0]["key"], weights.step["blocks"][0]["mlp"]["up"]
    assert key.sharding.spec == jax.P("fsdp", "tensor")
    moved = [x for x in collectives(text, {"fsdp": 4, "tensor": 2}) if "/while/body/" in x.source]
    largest = max(moved, key=lambda x: x.bytes)
    activations = 2 * 4 * rows * config.mlp_width // 2  # of gate and up, summed at once
    assert largest.bytes == activations < min(key.nbytes, up.nbytes) // 8, largest


@pytest.mark.slow
def test_devices_share_the_reading_of_prompts():
    costs = []
    for model in one_and_many("llama", MESHES[1], context=256, width=128, mlp_width=256):
        weights, config, _ = prepare_model(model)
        decoder = Decoder(config)
        each = [decoder.request(list(range(70 + i)), max_new_tokens=8) for i in range(8)]
        requests = jax.tree.map(lambda *parts: np.concatenate(parts), *each)
        static = {"config": config, "transform": decoder.transform, "size": 256}
        with using(weights.mesh):
            compiled = state.prefill.lower(weights.prefill, requests, **static).compile()
        costs.append(compiled.cost_analysis()["flops"])
    assert costs[1] <= 1.1 * costs[0] / 8, costs


def test_what_runs_on_one_device_is_refused_by_name():
    one, many = one_and_many("gpt", MESHES[1], layers=2, width=16)
    for name, value in {"speculate": gx.prompt_lookup(), "search": gx.beam(2)}.items():
        with pytest.raises(ValueError, match=f"{name} runs on one device, but the parameters are on several: leave it"):
            gx.generate(many, [5, 6], max_new_tokens=2, **{name: value})
    for kind, name in ((gx.window(8), "window"), ("int8", "int8")):
        with pytest.raises(ValueError, match=f"cache={name} does not go with parameters on several devices"):
            gx.generate(many, [5, 6], max_new_tokens=2, cache=kind)
    staged = place(one[0], models.parameters(one[1]), make_mesh("pipeline=2,data=4"))
    with pytest.raises(
        ValueError, match="do not run in stages: put the parameters on a mesh without the axis pipeline"
    ):
        gx.generate((staged, one[1]), [5, 6], max_new_tokens=2)


@pytest.mark.slow
def test_one_command_writes_with_a_model_that_is_split_while_it_is_read(tmp_path, capsys):
    config = gx.preset("llama-tiny", layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, vocab=256)
    gx.save(gx.Model(config, gx.init(config, jax.random.key(0)), ByteTokenizer()), tmp_path)
    written = []
    for more in ([], ["--mesh", MESHES[1]]):
        words = ["generate", str(tmp_path), "Once", "--temperature", "0.5", "--max-new-tokens", "6", "--no-cache"]
        assert main([*words, *more]) == 0
        assert main(["score", str(tmp_path), "--text", "Once upon", *more]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert len(written[0]) > 100
