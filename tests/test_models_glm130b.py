"""GLM-130B and ChatGLM-6B against their authors' code, in all position rules; padding, packing, choices, files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import CHATGLM_6B, FOLDER, arrays, config, params, relative_error

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.kernels import masks

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTRACT = 2e-6
forward = jax.jit(gx.forward, static_argnums=2)
ROW = {"glm130b": "GLM-130B", **dict.fromkeys(CHATGLM_6B, "ChatGLM-6B")}
#: [MASK] in the text, [gMASK] behind it, and GLM-130B's code with its 2-D option.
RUNS = [("glm130b", "mask"), ("glm130b", "gmask"), ("glm130b", "pos2d")]
RUNS += [(case, kind) for case in CHATGLM_6B for kind in ("mask", "gmask")]
FIRST = [("glm130b", "mask"), ("glm130b", "gmask"), ("chatglm1_ref", "mask"), ("chatglm1_ref", "gmask")]
FORMS = pytest.mark.parametrize("form", [lambda p: p, gx.unstack], ids=["stacked", "unstacked"])


@functools.cache
def run_of(case, kind):
    """(config, ids [T], length of the text, positions [T] or [2, T], logits [T, V])"""
    z, c = arrays(case), dataclasses.replace(config(case), positions_2d=case != "glm130b" or kind == "pos2d")
    ids = z["gmask_ids" if kind == "pos2d" else f"{kind}_ids"][0]
    return c, ids, ids.tolist().index(c.sop), z[f"{kind}_pos"][0], z[f"{kind}_logits"][0]


def prefix(context, length):
    return masks.prefix(jnp.array([context], jnp.int32), length)


def alone(case, kind, end=None):
    c, ids, context, positions, _ = run_of(case, kind)
    mask = prefix(context, len(ids[:end]))
    return forward(params(case), ids[None, :end], c, positions=positions[None, ..., :end], mask=mask)[0][0]


@pytest.mark.parametrize(("case", "kind"), RUNS)
def test_full_pass(case, kind, table):
    c, ids, context, positions, wanted = run_of(case, kind)
    mask = prefix(context, len(ids))
    published = arrays(case)[f"{'gmask' if kind == 'pos2d' else kind}_mask"][:, 0]  # True is masked
    np.testing.assert_array_equal(mask.dense(), ~published)
    logits, _ = forward(params(case), ids[None], c, positions=positions[None], mask=mask)
    error = relative_error(logits[0], wanted)
    table(ROW[case], "full", error)
    assert error <= CONTRACT


@pytest.mark.parametrize(("case", "kind"), FIRST)
@FORMS
def test_the_text_at_once_and_the_answer_from_the_cache(case, kind, form, table):
    c, ids, context, positions, wanted = run_of(case, kind)
    p, mask = form(params(case)), prefix(context, len(ids))
    cache, done = gx.cache_for(p, c, 1, 20), []
    for at in (slice(0, context), *(slice(i, i + 1) for i in range(context, len(ids)))):
        part = masks.Mask({name: s[:, at] for name, s in mask.query.items()})
        logits, cache = forward(p, ids[None, at], c, positions=positions[None, ..., at], mask=part, cache=cache)
        done.append(logits[0])
    error = relative_error(jnp.concatenate(done), wanted)
    table(ROW[case], "cached", error)
    assert error <= CONTRACT


@pytest.mark.parametrize(("case", "kind"), [run for run in RUNS if run[1] != "pos2d"])
def test_blanks_tells_the_published_positions(case, kind):
    c, ids, context, positions, _ = run_of(case, kind)
    blanks, text = models.blanks(c), ids[:context].tolist()
    (place,) = blanks.mask_indices(text)
    np.testing.assert_array_equal(blanks.positions(text, place, len(ids) - context), np.atleast_2d(positions))
    assert blanks.sop == ids[context]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("case", ["glm130b", "chatglm1_ref"])
def test_padded_rows_equal_unpadded_ones(case, left, table):
    """[MASK] and [gMASK] in one batch, the second shorter."""
    sizes, width = {"mask": 13, "gmask": 10}, 15
    c, _, _, positions, _ = run_of(case, "mask")
    tokens, rank = np.zeros((2, width), np.int32), np.zeros((2, width), np.int32)
    segment, places = np.full((2, width), masks.PAD, np.int32), np.zeros((2, *positions.shape[:-1], width), np.int32)
    spans = [slice(width - size, width) if left else slice(0, size) for size in sizes.values()]
    for row, (kind, size) in enumerate(sizes.items()):
        _, ids, context, positions, _ = run_of(case, kind)
        tokens[row, spans[row]], segment[row, spans[row]] = ids[:size], 0
        places[row, ..., spans[row]] = positions[..., :size]
        rank[row, spans[row]] = [*[0] * context, *range(context, size)]
    mask = masks.Mask({"rank": jnp.asarray(rank), "segment": jnp.asarray(segment)})
    logits, _ = forward(params(case), tokens, c, positions=places, mask=mask)
    for row, (kind, size) in enumerate(sizes.items()):
        error = relative_error(logits[row, spans[row]], alone(case, kind, size))
        table(ROW[case], "padded", error)
        assert error <= CONTRACT


@pytest.mark.parametrize("case", ["glm130b", "chatglm1_ref"])
def test_packed_texts_equal_separate_ones(case):
    """Two texts with answers in one row, each with a prefix of its own, and padding behind."""
    c = config(case)
    streams, tokens, places, cuts = {"rank": [], "segment": []}, [], [], []
    for number, kind in enumerate(("mask", "gmask")):
        _, ids, context, positions, _ = run_of(case, kind)
        cuts.append(slice(len(tokens), len(tokens) + len(ids)))
        tokens, places = [*tokens, *ids], [*places, positions]
        streams["rank"] += [*[0] * context, *range(context, len(ids))]
        streams["segment"] += [number] * len(ids)
    places.append(np.zeros_like(positions[..., :2]))
    streams = {"rank": [*streams["rank"], 0, 0], "segment": [*streams["segment"], masks.PAD, masks.PAD]}
    mask = masks.Mask({name: jnp.array([s], jnp.int32) for name, s in streams.items()})
    positions = np.concatenate(places, axis=-1)[None]
    logits, _ = forward(params(case), jnp.array([[*tokens, 0, 0]]), c, positions=positions, mask=mask)
    for cut, kind in zip(cuts, ("mask", "gmask"), strict=True):
        assert relative_error(logits[0, cut], run_of(case, kind)[4]) <= CONTRACT


def test_without_a_gmask_nothing_counts_on():
    c = dataclasses.replace(config("glm130b"), generation_mask=None)
    assert models.blanks(c).positions([1, c.mask, 2], 1, 3).tolist() == [[0, 1, 2, 1, 1, 1]]


def test_presets_in_the_table(table):
    for row, count in (("GLM-130B", 1), ("ChatGLM-6B", 2)):
        names = [name for name in models.glm130b.PRESETS if row.lower() in name]
        assert len(names) == count
        table(row, "presets", count)


def test_alpha_and_head_are_of_the_published_code():
    """The bound tells 28 layers' alpha from the real depth's, and the stored head from the embedding."""
    c, ids, context, positions, wanted = run_of("chatglm1_ref", "gmask")
    tied = {name: part for name, part in params("chatglm1_ref").items() if name != "head"}
    for p, changes in (
        (params("chatglm1_ref"), {"alpha_layers": 3, "dialect": "glm-130b"}),
        (tied, {"tied": True}),
    ):
        other = dataclasses.replace(c, **changes)
        logits, _ = forward(p, ids[None], other, positions=positions[None], mask=prefix(context, len(ids)))
        assert relative_error(logits[0], wanted) > 1000 * CONTRACT
    with pytest.raises(ValueError, match="do not fit the config: head unknown"):
        forward(params("chatglm1_ref"), ids[None], dataclasses.replace(c, tied=True), positions=positions[None])


def test_rounded_frequencies():
    """ChatGLM-6B's ladder over 64 entries, as its code builds it; one angle far out tells it from the exact one."""
    tables = np.load(FOLDER / "tables.npz")
    c = gx.preset("chatglm-6b")
    np.testing.assert_array_equal(models.glm130b._frequencies(c), tables["chatglm1_inv_freq_half"])
    exact = dataclasses.replace(c, half_frequencies=False, dialect="glm-130b")
    np.testing.assert_allclose(models.glm130b._frequencies(exact), tables["chatglm1_inv_freq_fp32"], rtol=1e-6)


def test_initial_values_are_deepnorms():
    """Xavier normal; values, outputs and feed-forward layers smaller by alpha (Zeng et al. 2023, section 2.3)."""
    c = models.glm130b.Config(
        vocab=64, width=64, layers=2, heads=4, mlp_width=96, gated=True, alpha_layers=8, dialect="glm-130b"
    )
    layer = gx.init(c, jax.random.key(0))["blocks"]
    stds = {name: 64**-0.5 / (4 if name in ("value", "out") else 1) for name in ("query", "key", "value", "out")}
    stds |= dict.fromkeys(("gate", "up", "down"), (2 / 160) ** 0.5 / 4)
    for name, std in stds.items():
        x = (layer["attention"] | layer["mlp"])[name]
        assert x.std() == pytest.approx(std, rel=5 / (2 * x.size) ** 0.5), name


# -- The fixture of li-plus/chatglm.cpp: one layer of the official code, hidden states --------------------------------


def test_hidden_states_of_the_official_code(table):
    z = np.load(FOLDER / "cpp_glm.npz")
    c = models.glm130b.Config(vocab=5, context=16, width=32, layers=1, heads=8, mlp_width=128)
    stored = {f"transformer.{name}": x for name, x in z.items()}
    p = spec.map_specs(
        lambda s: jnp.stack([s.layout.read(stored[name]) for name in s.names]).reshape(s.shape),
        models.glm130b.parameters(c),
    )
    places = jnp.array([[[0, 1, 1, 1, 1], [0, 0, 1, 2, 3]]])
    ids = jnp.array([[0, 1, 2, 3, 4]])
    wanted = np.concatenate([z["y1"], z["y2"], z["y3"]])
    hidden = functools.partial(jax.jit(models.hidden, static_argnums=2), p)
    error = relative_error(hidden(ids, c, positions=places, mask=prefix(2, 5))[0][0], wanted)
    table("ChatGLM-6B", "full", error)
    assert error <= CONTRACT
    x, cache = hidden(ids[:, :3], c, positions=places[..., :3], mask=prefix(2, 3), cache=gx.cache_for(p, c, 1, 8))
    done = [x[0]]
    for i in (3, 4):
        x, cache = hidden(ids[:, i : i + 1], c, positions=places[..., i : i + 1], cache=cache)
        done.append(x[0])
    error = relative_error(jnp.concatenate(done), wanted)
    table("ChatGLM-6B", "cached", error)
    assert error <= CONTRACT


# -- Multiple choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "kind"), FIRST)
def test_choices_equal_separate_answers(case, kind):
    c, ids, context, _, _ = run_of(case, kind)
    blanks, text, answers = models.blanks(c), ids[:context].tolist(), [[7, 8, 9], [11], [12, 13, 14]]
    (place,) = blanks.mask_indices(text)
    batch = blanks.choices(text, place, answers)

    def logits_of(tokens, positions, mask):
        positions = positions if c.positions_2d else positions[0]
        return forward(params(case), jnp.asarray(tokens)[None], c, positions=jnp.asarray(positions)[None], mask=mask)[0]

    mask = masks.choices(jnp.asarray(batch["choice"])[None])
    dense = np.zeros((len(batch["tokens"]),) * 2, bool)  # GLM-130B evaluation/dataset.py, by hand
    dense[:, :context] = True
    at = context
    for answer in answers:
        dense[at : at + len(answer), at : at + len(answer)] = np.tri(len(answer))
        at += len(answer)
    np.testing.assert_array_equal(mask.dense()[0], dense)
    logits, at = logits_of(batch["tokens"], batch["positions"], mask)[0], context
    for answer in answers:
        tokens = [*text, c.sop, *answer[:-1]]
        own = logits_of(tokens, blanks.positions(text, place, len(answer)), prefix(context, len(tokens)))[0, context:]
        assert relative_error(logits[at : at + len(answer)], own) <= CONTRACT
        np.testing.assert_array_equal(batch["targets"][at : at + len(answer)], answer)
        at += len(answer)
    if case == "glm130b":
        places = {"mask": [3] * 7, "gmask": [context + i for i in (0, 1, 2, 0, 0, 1, 2)]}
        assert batch["positions"][0, context:].tolist() == places[kind]


def test_padding_in_a_batch_of_choices_is_masked():
    dense = np.asarray(masks.choices(jnp.array([[0, 0, 1, 1, 2, masks.PAD]])).dense()[0])
    wanted = [[1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [0] * 6]
    np.testing.assert_array_equal(dense, np.array(wanted, bool))


# -- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["glm130b", "chatglm1_ref"])
def test_export_import_export_keeps_every_byte(case, tmp_path):
    gx.save(gx.Model(config(case), params(case), None), tmp_path / "one")
    model = gx.load(tmp_path / "one")
    assert model.config == config(case)
    jax.tree.map(np.testing.assert_array_equal, model.params, params(case))
    gx.save(model, tmp_path / "two")
    ids = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    if case == "chatglm1_ref":  # whose <sop> and <eop> its config.json calls bos and eos
        assert ids == {"bos_token_id": 114, "eos_token_id": 115}
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_two_chatglms_are_told_apart():
    """ChatGLM2's and 3's config.json says model_type chatglm as well."""
    raw = json.loads(json.dumps(models.glm130b.to_hf(gx.preset("chatglm-6b"))))
    assert [dialect.claims(raw) for dialect in models.glm130b.DIALECTS] == [True, False]
    second = {"model_type": "chatglm", "ffn_hidden_size": 13696, "padded_vocab_size": 65024, "seq_length": 32768}
    assert not any(dialect.claims(second) for dialect in models.glm130b.DIALECTS)


def test_positions_of_a_wrong_shape_are_named():
    for case, shape in (("glm130b", r"\[batch, length\]"), ("chatglm1_ref", r"\[batch, 2, length\]")):
        with pytest.raises(ValueError, match=shape):
            gx.forward(params(case), jnp.zeros((1, 3), int), config(case), positions=jnp.zeros((1, 3, 3), int))
