"""Prefixes: those of PEFT 0.21.2 and of ChatGLM's own code against their logits (tests/peft), and texts behind them."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from safetensors.numpy import load_file

import garrulax as gx
from garrulax import models
from garrulax.kernels import masks
from garrulax.models.prefix import Prefix, forward_after

pytestmark = pytest.mark.usefixtures("quick_compilation")
PEFT = pathlib.Path(__file__).parent / "peft"
QUICK = [("gpt2", "prefix"), ("llama", "prompt")]
CASES = [
    pytest.param(family, case, marks=[] if (family, case) in QUICK else pytest.mark.slow)
    for family in ("gpt2", "llama")
    for case in ("prefix", "prompt", "prefix_mlp", "ptuning")
]


@pytest.fixture(scope="module")
def reference():
    return np.load(PEFT / "logits.npz")


@pytest.fixture(scope="module")
def bases():
    return {family: gx.load(PEFT / family / "base") for family in ("gpt2", "llama")}


@pytest.mark.parametrize(("family", "case"), CASES)
def test_a_prefix_of_peft_gives_its_logits_and_is_saved_as_it_was(family, case, reference, bases, tmp_path):
    model = gx.load_adapter(bases[family], PEFT / family / case)
    ids = jnp.asarray(reference["input_ids"], jnp.int32)
    params = models.unstack(model.params)
    found, _ = forward_after(model.prefix, params, ids, model.config)
    np.testing.assert_allclose(found, reference[f"{family}/{case}/logits"], atol=1e-5)
    if case == "prefix":  # the other rule of positions
        other = dataclasses.replace(model.prefix, counted=False)
        wanted = reference[f"{family}/prefix/logits_positions_from_0"]
        np.testing.assert_allclose(forward_after(other, params, ids, model.config)[0], wanted, atol=1e-5)
    gx.save_adapter(model, tmp_path / "saved")
    ours, theirs = (
        load_file(place / "adapter_model.safetensors") for place in (tmp_path / "saved", PEFT / family / case)
    )
    assert ours.keys() == theirs.keys()
    np.testing.assert_array_equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    raw = [
        json.loads((place / "adapter_config.json").read_text()) for place in (tmp_path / "saved", PEFT / family / case)
    ]
    assert raw[0] == raw[1]


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("chatglm1", "projection"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in [("chatglm1", "plain"), ("chatglm2", "plain")]),
        pytest.param("chatglm2", "projection", marks=pytest.mark.slow),
    ],
)
def test_p_tuning_of_chatglm_gives_its_logits(case, kind, reference, tmp_path):
    name = {"chatglm1": "chatglm1_ref"}.get(case, case)
    model = gx.Model(oracle.config(name), models.unstack(oracle.params(name)))
    shutil.copyfile(PEFT / "ptuning" / f"{case}_{kind}.safetensors", tmp_path / "model.safetensors")
    model = gx.load_adapter(model, tmp_path)
    pairs = reference[f"ptuning/{case}/{kind}/keys_values"][:, :, :, 0]  # [L, 2, P, K, C]
    np.testing.assert_allclose(model.prefix.key, pairs[:, 0], atol=1e-5)
    np.testing.assert_allclose(model.prefix.value, pairs[:, 1], atol=1e-5)
    ids = jnp.asarray(reference[f"ptuning/{case}/ids"], jnp.int32)
    options = {}
    if case == "chatglm1":  # the text both ways, and its positions in two rows
        context = ids[0].tolist().index(model.config.sop)
        mask = masks.prefix(jnp.array([context], jnp.int32), ids.shape[1])
        options = {"mask": mask, "positions": jnp.asarray(oracle.arrays(name)["gmask_pos"], jnp.int32)}
    found, _ = forward_after(model.prefix, model.params, ids, model.config, **options)
    np.testing.assert_allclose(found, reference[f"ptuning/{case}/{kind}/logits"], atol=2e-5)
    gx.save_adapter(model, tmp_path / "saved")
    assert list(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == [
        "transformer.prefix_encoder.embedding.weight"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prefix", "prompt"])
def test_texts_are_written_behind_a_prefix(case, bases):
    model = gx.load_adapter(bases["llama"], PEFT / "llama" / case)
    ids = [5, 17, 3]
    for _ in range(6):
        logits, _ = forward_after(model.prefix, model.params, jnp.array([ids], jnp.int32), model.config)
        ids.append(int(jnp.argmax(logits[0, -1])))
    several = gx.generate(model, [[9, 2], [5, 17, 3]], max_new_tokens=6, temperature=0)
    assert list(several[1].tokens) == ids[3:]
    assert list(gx.generate(bases["llama"], [5, 17, 3], max_new_tokens=6, temperature=0).tokens) != ids[3:]


def test_a_prefix_is_not_left_out(bases):
    model = gx.load_adapter(bases["llama"], PEFT / "llama" / "prefix")
    for use in (lambda: gx.score(model, [[1, 2]]), lambda: gx.save(model, "unused"), lambda: gx.merge(model)):
        with pytest.raises(ValueError, match="prefix"):
            use()
    with pytest.raises(ValueError, match="is for another model"):
        gx.load_adapter(bases["gpt2"], PEFT / "llama" / "prefix")
    wrong = Prefix(jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"a prefix of \(1, 3, 4\) layers"):
        forward_after(wrong, model.params, jnp.zeros((1, 2), jnp.int32), model.config)
    with pytest.raises(ValueError, match="a prefix goes with sampling of one adapter only"):
        gx.generate(model, [1, 2], search=gx.beam(2), max_new_tokens=2)
    with pytest.raises(ValueError, match="do not fit behind a prefix of 5"):
        gx.generate(model, [1, 2], max_new_tokens=model.config.max_length - 2)


@pytest.mark.slow
def test_a_prefix_gets_gradients(bases):
    model = gx.load_adapter(bases["llama"], PEFT / "llama" / "prefix")
    tokens = jnp.array([[1, 2, 3]], jnp.int32)

    def loss(prefix):
        return jnp.sum(forward_after(prefix, model.params, tokens, model.config)[0] ** 2)

    grads = jax.jit(jax.grad(loss))(model.prefix)
    step = 1e-2 * grads.value / jnp.linalg.norm(grads.value)
    ahead, behind = (loss(dataclasses.replace(model.prefix, value=model.prefix.value + s * step)) for s in (1, -1))
    np.testing.assert_allclose(ahead - behind, 2 * jnp.sum(step * grads.value), rtol=1e-2)
