"""Medusa: heads, trees and posterior against FasterDecoding/Medusa; texts against plain decoding; training."""

import dataclasses
import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import arrays, raw_config, relative_error, tensors
from safetensors.numpy import load_file, save_file
from tiny import byte_model

import garrulax as gx
from garrulax import models, sampling
from garrulax.core import spec
from garrulax.hub.reading import family_of
from garrulax.models import medusa
from garrulax.sampling.speculate import medusa_trees
from garrulax.sampling.speculate.interface import Proposal
from garrulax.sampling.speculate.typical import typical
from garrulax.sampling.state import without_layers
from garrulax.train import train_medusa
from garrulax.train.medusa import heads_objective, joint_objective
from garrulax.train.objectives import causal_lm, mask_of

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


@pytest.mark.slow
def test_texts_are_those_of_the_reference_in_as_many_passes(heads):
    """The reference wrote `generated` in 12 steps. Our first pass has no drafts, and each adds one more token."""
    ids, expected = Z["ids"][0].tolist(), Z["generated"].tolist()
    speculate = gx.medusa(heads, tree=medusa_trees.PATHS_63)
    done = gx.generate(
        model(), ids, max_new_tokens=len(expected) + 1, temperature=0, end_tokens=(), speculate=speculate
    )
    assert done.tokens[:-1] == expected
    assert done.passes == raw_config("medusa")["steps"] + 1


@functools.cache
def small():
    """A small model and heads, some of whose guesses are right."""
    config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=64, eos=None, context=64)
    one = (gx.init(config, jax.random.key(0)), config)
    new = medusa.init(one, heads=3)
    keys = jax.random.split(jax.random.key(3), len(jax.tree.leaves(new.params)))
    leaves, tree = jax.tree.flatten(new.params)
    noisy = [x + 0.02 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return one, medusa.MedusaHeads(new.config, jax.tree.unflatten(tree, noisy))


def test_exact_acceptance_gives_the_tokens_of_plain_decoding():
    one, noisy = small()
    prompts = [[5, 17, 3], [9], [1, 2, 3, 4, 5, 6, 7], [5, 17, 3]]
    knobs = {"temperature": [0, 0, 0.8, 0.3], "top_p": 0.9, "repetition_penalty": 1.2, "seed": [0, 1, 2, 3]}
    plain = gx.generate(one, prompts, max_new_tokens=20, **knobs)
    speculate = gx.medusa(noisy, tree=medusa_trees.PATHS_63[:5])
    fast = gx.generate(one, prompts, max_new_tokens=20, speculate=speculate, **knobs)
    assert [x.tokens for x in fast] == [x.tokens for x in plain]
    assert len({x.passes for x in fast}) > 1  # rows accept different numbers of drafts
    assert min(x.passes for x in fast) < 20


def test_typical_acceptance_takes_the_longest_typical_path():
    """The paper's formula in float64: p > min(epsilon, delta exp(-H)), the longest, then the most probable path."""
    one, _ = small()
    config = one[1]
    decoder = sampling.compile(one)
    request = decoder.request([5, 17, 3], max_new_tokens=12, temperature=0.7)
    request = jax.tree.map(lambda x: np.repeat(np.asarray(x), 16, axis=0), request)
    prefix = jax.eval_shape(lambda: decoder.prefill(one[0], request, size=32))
    chain = decoder.transform.init({**request.knobs, "ends": request.ends, "limit": request.limit, "vocab": 64,
        "prompt": request.prompt, "size": 32, "unconditional": request.unconditional})  # fmt: skip
    empty = without_layers(decoder.empty(one[0], prefix, rows=16, slots=32))
    ends, limit = jnp.asarray(request.ends), jnp.asarray(request.limit)
    state = dataclasses.replace(empty, done=jnp.zeros(16, bool), ends=ends, limit=limit, transform_state=chain)
    tree = medusa_trees.tree_of([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (1, 0, 0)])
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (16, 8, config.vocab)).astype(np.float32)
    order = np.argsort(-logits, axis=-1)
    drafts = np.stack([order[np.arange(16), up + 1, random.integers(0, 30, 16)] for up in tree.parents], 1)
    proposal = Proposal(jnp.asarray(drafts, jnp.int32), jnp.ones(drafts.shape, bool), jnp.ones(16, bool))
    accept = typical(0.1, 0.3)
    after, path = jax.jit(lambda s, p, x: accept(s, p, tree.parents, x, decoder.transform))(state, proposal, logits)
    p = np.exp(logits.astype(np.float64) / 0.7)
    p /= p.sum(-1, keepdims=True)
    limit = np.minimum(0.1, 0.3 * np.exp((p * np.log(p)).sum(-1)))
    lengths = []
    for row in range(16):
        best, found = (0, 0.0), []
        for draft in range(7):
            way = [draft]
            while tree.parents[way[0]] >= 0:
                way.insert(0, tree.parents[way[0]])
            each = [p[row, tree.parents[i] + 1, drafts[row, i]] for i in way]
            good = all(x > limit[row, tree.parents[i] + 1] for x, i in zip(each, way, strict=True))
            if good and (len(way), np.prod(each)) > best:
                best, found = (len(way), np.prod(each)), way
        lengths.append(len(found))
        assert path[row, : len(found) + 1].tolist() == [0, *(i + 1 for i in found)]
        assert int(after.generated[row]) == len(found) + 1
        assert after.tokens[row, : len(found)].tolist() == drafts[row, found].tolist()
        assert int(after.cache.used[row] - state.cache.used[row]) == len(found) + 1
    assert set(lengths) == {0, 1, 2, 3}


def test_best_paths_are_the_best_of_all_trees():
    accuracy = [[0.6, 0.25, 0.1], [0.5, 0.2, 0.12], [0.4, 0.15, 0.1]]
    paths = [p for n in (1, 2, 3) for p in itertools.product(range(3), repeat=n)]
    value = {p: np.prod([accuracy[i][j] for i, j in enumerate(p)]) for p in paths}
    for n in (1, 4, 9, 20):
        found = medusa_trees.best_paths(accuracy, n)
        medusa_trees.tree_of(found)  # has the parent of each path
        np.testing.assert_allclose(sum(value[p] for p in found), sum(sorted(value.values())[-n:]))


@pytest.mark.slow
def test_heads_learn_and_the_model_stays_as_it_is(tmp_path):
    (params, config), _ = small()
    before = jax.tree.map(np.array, params)
    texts = [[(i * 7 + start) % 12 for i in range(60)] for start in range(12)]
    lines = []
    heads = gx.train_medusa(
        (params, config), texts, heads=2, choices=12, steps=60, batch=4, window=20, lr=1e-2, report=lines.append
    )
    assert heads.accuracy[:, 0].min() > 0.9
    assert lines
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, before)))
    np.testing.assert_allclose(gx.medusa_accuracy((params, config), heads, texts)[:, 0], 1, atol=0.1)
    gx.save_medusa(heads, tmp_path / "heads")
    again = gx.load_medusa(tmp_path / "heads", (params, config))
    assert again.tokens.tolist() == list(range(12))
    np.testing.assert_allclose(again.accuracy, heads.accuracy, atol=1e-5)
    assert max(gx.medusa(again, tree=2).tree.head) == 1  # two heads that are sure: a chain is the best tree


def test_joint_loss_is_that_of_the_model_and_of_the_heads():
    (params, config), heads = small()
    batch = train_medusa.pack((params, config), [list(range(20)), [4, 4, 2] * 5], 16).batch(np.arange(2))

    @jax.jit
    def losses(params, own, batch):
        both = joint_objective(heads.config)({**params, "medusa": own}, batch, config)
        x, _ = models.hidden(params, batch["tokens"], config, positions=batch["positions"], mask=mask_of(batch))
        alone = heads_objective(heads.config)(own, {**batch, "hidden": x}, config)
        return *both, *causal_lm(params, batch, config), alone[0]

    both, metrics, lm, count, own = losses(params, heads.params, batch)
    np.testing.assert_allclose(float(both), float(lm) + 0.2 * float(own), rtol=1e-6)
    assert int(metrics["tokens"]) == int(count["tokens"])


@pytest.mark.slow
def test_commands_train_heads_and_write_with_them(tmp_path, capsys):
    from garrulax.cli import main

    one = byte_model("gpt", layers=1)
    gx.save(gx.Model(one.config, one.params, one.tokenizer), tmp_path / "model")
    (tmp_path / "text.txt").write_text("abcdefgh " * 40)
    words = [str(tmp_path / "model"), f"corpus={tmp_path / 'text.txt'}", "steps=2", "batch=2", "window=24"]
    assert main(["train", "--medusa", *words, "--heads", "2", "--choices", "2", "--run", str(tmp_path / "heads")]) == 0
    say = capsys.readouterr()
    assert "best tree" in say.err
    assert gx.load_medusa(tmp_path / "heads", one).config.choices == 2
    write = ["generate", str(tmp_path / "model"), "abc", "--max-new-tokens", "6", "--temperature", "0", "--no-cache"]
    assert main([*write, "--speculate", f"medusa={tmp_path / 'heads'}"]) == 0
    plain = gx.generate(one, "abc", max_new_tokens=6, temperature=0).text
    assert capsys.readouterr().out == f"abc{plain}\n"
    assert main([*write, "--speculate", "medusa"]) == 2
    assert "medusa= needs a folder of heads" in capsys.readouterr().err
    assert main(["train", "--medusa", *words, "lr=0", "--run", str(tmp_path / "other")]) == 2
    assert "lr=0.0 must be a number above 0" in capsys.readouterr().err
    assert main(["train", "--medusa", *words[:-1], "window=4096", "--run", str(tmp_path / "other")]) == 2
    assert "window=4096 is longer than model.context=" in capsys.readouterr().err
    assert main(["train", "--medusa", *words, "remat=full", "--run", str(tmp_path / "other")]) == 2
    assert "heads have no setting remat" in capsys.readouterr().err


def test_bad_input_is_named(heads, tmp_path):
    one, noisy = small()
    glm = gx.preset("glm-tiny", layers=1, width=32, heads=2, vocab=64)

    def other(**changes):
        config = dataclasses.replace(one[1], **changes)
        return spec.abstract(models.parameters(config)), config

    def with_accuracy(shares):
        gx.save_medusa(noisy, tmp_path / "saved")
        file = tmp_path / "saved" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "medusa_accuracy": shares}))
        return tmp_path / "saved"

    say = {
        "width of 32, the model has 48": lambda: gx.generate(other(width=48), [1], speculate=gx.medusa(noisy)),
        "vocabulary of 64, the model has 65": lambda: gx.generate(other(vocab=65), [1], speculate=gx.medusa(noisy)),
        "needs as many heads, and there are 3": lambda: gx.medusa(noisy, tree=[(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]),
        "deeper than the room left": lambda: gx.generate(
            one, [1], max_new_tokens=2, speculate=gx.medusa(noisy, tree=[(0,), (0, 0)])
        ),
        "not its parent": lambda: gx.medusa(noisy, tree=[(0,), (1, 0)]),
        "twice": lambda: gx.medusa(noisy, tree=[(0,), (0,)]),
        "exact acceptance only": lambda: gx.generate(
            byte_model("gpt", eos=256),
            "a",
            constrain=gx.regex("a+"),
            speculate=gx.medusa(medusa.init(byte_model("gpt"), 1), accept="typical"),
        ),
        "choose from exact, typical": lambda: gx.medusa(noisy, accept="greedy"),
        "epsilon=2 must be": lambda: gx.medusa(noisy, accept="typical", epsilon=2),
        "epsilon='1' must be": lambda: gx.medusa(noisy, accept="typical", epsilon="1"),
        "list of paths": lambda: gx.medusa(noisy, tree=1.5),
        "tree=True must be": lambda: gx.medusa(noisy, tree=True),
        "decay=-1 must be": lambda: gx.train_medusa(one, [[1, 2] * 40], decay=-1),
        "medusa_accuracy is not 3 lists": lambda: gx.load_medusa(with_accuracy([[0.5], [0.5, 0.1], [0.5]]), one),
        "medusa_accuracy is not 3": lambda: gx.load_medusa(with_accuracy([[0.5]]), one),
        "heads are what": lambda: gx.medusa(noisy.params),
        "fills blanks": lambda: medusa.init((None, glm)),
        "too few to train on": lambda: gx.train_medusa(one, [[1, 2]]),
        "one of which is 1": lambda: gx.train_medusa(one, [1, 2, 3]),
        "one of which is [1.5": lambda: gx.train_medusa(one, [[1.5, 2.5] * 40]),
        "window=65 is longer than model.context=64": lambda: gx.train_medusa(one, [[1, 2] * 40], window=65),
        "longer than model.context=64: lower": lambda: gx.medusa_accuracy(one, noisy, [[1, 2] * 40], window=99),
        "several texts": lambda: gx.train_medusa(one, "text"),
        "must be from 1 to": lambda: gx.train_medusa(one, [[1, 2] * 40], choices=99, steps=1),
        "too short for 9 heads": lambda: gx.train_medusa(one, [[1, 2] * 4], heads=9, steps=1),
        "misses '0.0.linear.bias'": lambda: gx.load_medusa(
            folder_of_the_reference(tmp_path, lambda name: name != "medusa_head.0.0.linear.bias"), model()
        ),
        "another model": lambda: gx.load_medusa(folder_of_the_reference(tmp_path), other(width=48)),
    }
    for message, call in say.items():
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            call()
