"""Medusa: heads, trees and posterior against FasterDecoding/Medusa; texts against plain decoding; training."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import arrays, raw_config, relative_error, tensors
from safetensors.numpy import load_file, save_file

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.hub.reading import family_of
from garrulax.models import medusa
from garrulax.sampling.speculate import medusa_trees
from garrulax.train import train_medusa
from garrulax.train.medusa import heads_objective

pytestmark = pytest.mark.usefixtures("quick_compilation")
Z = arrays("medusa")


@functools.cache
def model():
    """The base model of the reference case."""
    raw = {k: v for k, v in raw_config("medusa")["config"].items() if not k.startswith("medusa")}
    config, stored = family_of(raw).from_hf(raw), tensors("medusa")

    def one(s):
        parts = [s.layout.read(stored[name]) for name in s.names]
        return jnp.asarray(np.stack(parts) if s.layers else parts[0])

    return gx.Model(config, spec.map_specs(one, models.parameters(config)))


def folder_of_the_reference(place, keep=lambda name: True):
    """A checkpoint of model and heads together, as a trained Medusa-2 is stored."""
    save_file({k: v for k, v in tensors("medusa").items() if keep(k)}, place / "model.safetensors")
    settings = {"medusa_num_heads": 4, "medusa_num_layers": 1, "base_model_name_or_path": "tiny"}
    (place / "config.json").write_text(json.dumps(settings))
    return place


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    return gx.load_medusa(folder_of_the_reference(tmp_path_factory.mktemp("medusa")), model())


def test_logits_of_the_heads_equal_the_reference(heads, tmp_path):
    x, _ = models.hidden(model().params, Z["ids"].astype(np.int32), model().config)
    assert relative_error(models.family(model().config).logits(model().params, x, model().config), Z["logits"]) < 2e-6
    found = medusa.logits(heads.params, x, heads.config)
    assert relative_error(np.stack(found), Z["medusa_logits"]) < 2e-6
    gx.save_medusa(heads, tmp_path / "saved")
    stored, theirs = load_file(tmp_path / "saved" / "medusa_lm_head.safetensors"), tensors("medusa")
    assert {f"medusa_head.{name}" for name in stored} == {name for name in theirs if name.startswith("medusa_head.")}
    assert all(np.array_equal(x, theirs[f"medusa_head.{name}"]) for name, x in stored.items())
    again = gx.load_medusa(tmp_path / "saved", model())
    assert again.config == heads.config
    assert again.config.base == "tiny"
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.params, heads.params)))


def test_trees_have_the_buffers_of_the_reference():
    """The reference lists nodes by depth and path too; its mask is that of self, ancestors and root."""
    choices = raw_config("medusa")["choices"]
    assert [list(path) for path in medusa_trees.PATHS_63] == choices
    tree = medusa_trees.tree_of(choices)
    np.testing.assert_array_equal([0, *(i + 1 for i in tree.head)], Z["buf_medusa_position_ids"])
    indices = [0, *(1 + 10 * i + r for i, r in zip(tree.head, tree.rank, strict=True))]
    np.testing.assert_array_equal(indices, Z["buf_tree_indices"])
    mask = np.eye(64)
    for draft, parent in enumerate(tree.parents):
        mask[draft + 1] += mask[parent + 1]
    np.testing.assert_array_equal(mask, Z["buf_medusa_attn_mask"][0, 0])
    leaves = sorted(set(range(1, 64)) - {parent + 1 for parent in tree.parents})
    ours = {tuple(np.flatnonzero(mask[leaf])) for leaf in leaves}
    theirs = {tuple(int(i) for i in path if i >= 0) for path in Z["buf_retrieve_indices"]}
    assert ours == theirs


def test_loss_of_the_heads_is_the_formula_and_its_labels_stay_in_their_text():
    """Sum over heads of 0.8^(i + 1) times the mean of -log softmax at the token i + 2 further, in float64."""
    config = gx.preset("gpt2-tiny", layers=1, width=16, heads=2, vocab=11, eos=None)
    model = (gx.init(config, jax.random.key(0)), config)
    texts = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 1, 2], [5, 3, 1, 9, 7, 2]]
    rows = train_medusa.pack(model, texts, 8)
    batch = rows.batch(np.arange(2))
    x = np.random.default_rng(0).normal(size=(2, 8, 16))
    for chosen in (None, [1, 2, 3, 5, 7, 9]):
        start = medusa.init(model, 3, 2, chosen)
        params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), start.params)
        loss = heads_objective(start.config, start.tokens)
        whole_batch = {**batch, "hidden": jnp.asarray(x, jnp.float32)}
        found, metrics = jax.jit(lambda p, b, loss=loss: loss(p, b, config))(params, whole_batch)
        whole = np.concatenate(texts)
        owner = np.repeat(np.arange(3), [len(text) for text in texts])
        total = 0.0
        for i in range(3):
            p = jax.tree.map(lambda v: np.asarray(v, np.float64), params[str(i)])
            nll = []
            for row in range(2):
                for t in range(8):
                    at, label = row * 8 + t, row * 8 + t + i + 2
                    if label > row * 8 + 8 or owner[label] != owner[at]:
                        continue
                    y = x[row, t]
                    for n in range(2):
                        z = y @ p[f"block{n}"] + p[f"block{n}_bias"]
                        y = y + z / (1 + np.exp(-z))
                    z = p["head"] @ y
                    ids = list(range(11)) if chosen is None else sorted(chosen)
                    if whole[label] in ids:
                        nll.append(np.log(np.exp(z).sum()) - z[ids.index(whole[label])])
            total += 0.8 ** (i + 1) * np.mean(nll)
            assert i or int(metrics["tokens"]) == len(nll)
        np.testing.assert_allclose(float(found), total, rtol=2e-6)
