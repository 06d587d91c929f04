"""Random tiny models of every family that transformers has, against transformers itself (`make parity`).

PARITY_CASES=20 draws that many configurations a family.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.hub.reading import family_of, read_config_json
from garrulax.kernels import masks
from garrulax.train.objectives import negative_log_likelihood

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import peer as peers
import transformers
from registry import FAMILIES

SINGLE, DOUBLE = 2e-5, 1e-9  # promised in float32 and float64
#: Settings with several words for the same, and what the config classes make of some of them.
SAID_IN_SEVERAL_WAYS = {
    "rope_parameters", "attention_types", "window_size", "max_window_layers", "num_ln_in_parallel_attn",
}  # fmt: skip
RESOLVED = {"attention_layers", "layer_types"}
forward = jax.jit(gx.forward, static_argnums=2)


def _cases():
    for family in (drawn for entry in FAMILIES.values() for drawn in entry.draws):
        for number in range(int(os.environ.get("PARITY_CASES", family.cases))):
            name = f"{family.id}-{number}"
            yield pytest.param((family, number), id=name, marks=pytest.mark.xdist_group(name))


class Case:
    """The two models, theirs (`peer`) and ours, and the family that they are of."""

    def __init__(self, family, number, folder):
        self.family, self.peer = family, peers.Peer(family, number)
        self.peer.model.save_pretrained(folder)
        self.raw = read_config_json(folder)
        self.module = family_of(self.raw)
        self.model = gx.load(folder)
        self.native = self.model.config  # in the dialect of transformers' class
        if family.detour:
            other = dataclasses.replace(self.native, dialect=family.detour)
            gx.save(self.model.replace(config=other), folder / "detour")
            self.model = gx.load(folder / "detour")
        self.config, self.params = self.model.config, self.model.params


@pytest.fixture(scope="module", params=_cases())
def case(request, tmp_path_factory):
    return Case(*request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def assert_within(case, record_property):
    """assert_within(what, ours, theirs, bound): the largest difference, relative to the largest of theirs."""

    def check(what, ours, theirs, bound):
        theirs = np.asarray(theirs, np.float64)
        error = float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())
        record_property("parity", [case.family.id, what, error])
        assert error <= bound, case.config

    return check


def test_logits(case, assert_within, table):
    logits, _ = forward(case.params, jnp.asarray(case.peer.tokens), case.config)
    assert_within("float32", logits, case.peer.logits(case.peer.tokens), SINGLE)
    table(case.family.row, "parity", "yes")


def test_padded_rows(case, assert_within):
    """Left and right padding in one batch, given to both sides in the same way."""
    texts = [case.peer.tokens[0, :15], case.peer.tokens[1, :9]] * 2
    tokens, valid = np.zeros((4, 15), int), np.zeros((4, 15), int)
    for i, text in enumerate(texts):
        at = slice(15 - len(text), 15) if i < 2 else slice(0, len(text))
        tokens[i, at], valid[i, at] = text, 1
    positions = np.maximum(valid.cumsum(1) - 1, 0)
    ours, _ = forward(
        case.params, jnp.asarray(tokens), case.config, mask=masks.padded(jnp.asarray(valid)),
        positions=jnp.asarray(positions),
    )  # fmt: skip
    if case.peer.rope in peers.LENGTH_DEPENDENT:  # theirs goes by the longest row of the batch, ours by each row
        theirs = [case.peer.logits(text[None])[0] for text in texts]
    else:
        batch = case.peer.logits(tokens, attention_mask=valid, position_ids=positions)
        theirs = [row[real] for row, real in zip(batch, valid.astype(bool), strict=True)]
    ours = [row[real] for row, real in zip(np.asarray(ours), valid.astype(bool), strict=True)]
    assert_within("padded", np.concatenate(ours), np.concatenate(theirs), SINGLE)


def test_float64_logits_and_gradients(case, assert_within, tmp_path):
    """Of every parameter, and so of an embedding, the matrices of attention, gains and biases."""
    tokens = case.peer.tokens
    with peers.double_precision():
        twin = case.peer.double()
        theirs = case.peer.logits(tokens, twin)
        case.peer.put_gradients(tokens, twin)
    twin.save_pretrained(tmp_path)  # which renames parameters to tensors as their class does
    wanted = load_file(tmp_path / "model.safetensors")

    def loss(params, tokens):
        logits, _ = gx.forward(params, tokens, case.config)
        return negative_log_likelihood(logits[:, :-1], tokens[:, 1:]).mean(), logits

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), case.params)
        gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params, jnp.asarray(tokens))
        assert_within("float64", ours, theirs, DOUBLE)
        gradients = spec.named_specs(gradients)
    largest = max(np.abs(g).max() for g in wanted.values())
    for path, s in spec.named_specs(models.parameters(case.native)).items():
        parts = [s.layout.read(wanted[name]) for name in s.names]
        theirs = np.stack(parts) if s.layers else parts[0]
        if np.abs(theirs).max() < 1e-9 * largest:  # a bias of keys, which softmax does not see: rounding on both sides
            assert np.abs(gradients[path]).max() < 1e-9 * largest
        else:
            assert_within("gradients", gradients[path], theirs, DOUBLE)


def test_greedy_generation(case):
    """Token by token, in a batch of two prompts of different lengths; theirs one at a time."""
    completions = gx.generate(case.model, case.peer.prompts, max_new_tokens=peers.STEPS, temperature=0)
    for prompt, completion in zip(case.peer.prompts, completions, strict=True):
        ours = completion.tokens
        if case.peer.rope in peers.LENGTH_DEPENDENT:
            # Theirs keeps keys that were turned by the angles of a shorter text; ours plans the whole one. So the
            # reference is a pass over the whole text: its choices at each place are ours.
            text = [*prompt, *ours, *[0] * (peers.STEPS - len(ours))]
            theirs = case.peer.logits([text])[0, len(prompt) - 1 :].argmax(-1)[: len(ours)].tolist()
            assert len(ours) == peers.STEPS or ours[-1] in case.peer.ends
        else:
            theirs = case.peer.greedy(prompt, case.peer.ends)
        assert ours == theirs, case.config


def test_the_way_back(case, tmp_path, table):
    """What gx.save writes, transformers loads: every tensor, every drawn setting, the very same logits."""
    gx.save(case.model.replace(config=case.native), tmp_path / "export")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is type(case.peer.model)
    np.testing.assert_array_equal(case.peer.logits(case.peer.tokens, model.eval()), case.peer.logits(case.peer.tokens))
    for key in (case.peer.drawn.keys() | RESOLVED) - SAID_IN_SEVERAL_WAYS:
        assert getattr(model.config, key, None) == getattr(case.peer.config, key, None), key
    assert gx.load(tmp_path / "export").config == case.native
    table(case.family.row, "export", "yes")
