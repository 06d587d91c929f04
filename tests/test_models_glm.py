"""The original GLM against THUDM/GLM's own code: six corruption modes, losses, blank filling, the cloze score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import arrays, config, params, relative_error

import garrulax as gx
from garrulax.kernels import masks

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODES = ("token", "token_noshuffle", "token_dblock", "sentence", "document", "document_midspan")
CONTRACT = 2e-6
forward = jax.jit(gx.forward, static_argnums=2)
Z, C = arrays("glm_original"), config("glm_original")


def run(name, **changes):
    tokens = jnp.asarray(Z[f"{name}_text" if name in MODES else f"{name}_ids"])
    mask = masks.prefix(jnp.asarray(Z[f"{name}_sep"], jnp.int32), tokens.shape[1])
    logits, _ = forward(params("glm_original"), tokens, C, positions=jnp.asarray(Z[f"{name}_pos"]), mask=mask)
    return np.asarray(logits)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("mode", MODES)
def test_logits_and_loss(mode, table):
    logits = run(mode)
    error = relative_error(logits, Z[f"{mode}_logits"])
    table("GLM", "full", error)
    assert error <= CONTRACT
    score = np.take_along_axis(log_softmax(logits), Z[f"{mode}_target"][..., None], -1)[..., 0]
    weight = Z[f"{mode}_loss_mask"]
    assert -(score * weight).sum() / weight.sum() == pytest.approx(float(Z[f"{mode}_loss"]), rel=1e-6)


def test_blank_filling_and_cloze_score():
    logits = run("gen")
    assert relative_error(logits, Z["gen_logits"]) <= CONTRACT
    score = np.take_along_axis(log_softmax(logits), Z["cloze_target"][..., None], -1)[..., 0]
    assert (score * Z["cloze_mask"]).sum(-1) == pytest.approx(Z["cloze_score"], rel=1e-6)


@pytest.mark.parametrize("form", [lambda p: p, gx.unstack], ids=["stacked", "unstacked"])
def test_blank_filling_from_the_cache(form, table):
    """Part A at once, then [sop] and the answer token by token: the rank of part A is one, then rising."""
    p = form(params("glm_original"))
    tokens, positions, context = jnp.asarray(Z["gen_ids"]), jnp.asarray(Z["gen_pos"]), int(Z["gen_sep"][0])
    mask = masks.prefix(jnp.array([context], jnp.int32), tokens.shape[1])
    cache, done = gx.cache_for(p, C, 1, 20), []
    for at in (slice(0, context), *(slice(i, i + 1) for i in range(context, tokens.shape[1]))):
        part = masks.Mask({name: s[:, at] for name, s in mask.query.items()})
        logits, cache = forward(p, tokens[:, at], C, positions=positions[:, :, at], mask=part, cache=cache)
        done.append(logits)
    error = relative_error(jnp.concatenate(done, axis=1), Z["gen_logits"])
    table("GLM", "cached", error)
    assert error <= CONTRACT


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_equal_unpadded_ones(left, table):
    """Two blank-filling rows of different lengths in one batch."""
    lengths, contexts, width = [20, 14], [9, 6], 20
    text = Z["token_source"][:2]
    tokens, positions = np.zeros((2, width), int), np.zeros((2, 2, width), int)
    rank, segment = np.zeros((2, width), np.int32), np.full((2, width), masks.PAD, np.int32)
    for i, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        at = slice(width - length, width) if left else slice(0, length)
        spans = np.arange(1, length - context + 1)
        tokens[i, at], segment[i, at] = text[i, :length], 0
        positions[i, :, at] = [[*range(context), *[2] * len(spans)], [*[0] * context, *spans]]
        rank[i, at] = [*[0] * context, *(context + spans)]
    mask = masks.Mask({"rank": jnp.asarray(rank), "segment": jnp.asarray(segment)})
    logits, _ = forward(params("glm_original"), jnp.asarray(tokens), C, positions=jnp.asarray(positions), mask=mask)
    for i, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        at = slice(width - length, width) if left else slice(0, length)
        alone, _ = forward(
            params("glm_original"), jnp.asarray(tokens[i : i + 1, at]), C, positions=positions[i : i + 1, :, at],
            mask=masks.prefix(jnp.array([context], jnp.int32), length),
        )  # fmt: skip
        error = relative_error(logits[i, at], alone[0])
        table("GLM", "padded", error)
        assert error <= CONTRACT


def test_packed_texts_equal_separate_ones():
    """Two texts with their blanks in one row, each with its own part A, and padding behind them."""
    lengths, contexts = [13, 9], [6, 5]
    text = Z["token_source"][:2]
    rows = []
    for i, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        spans = np.arange(1, length - context + 1)
        positions = np.array([[*range(context), *[2] * len(spans)], [*[0] * context, *spans]])
        rows.append((text[i, :length], positions, [*[0] * context, *(context + spans)], [i] * length))
    end = (np.zeros(2, int), np.zeros((2, 2), int), [0, 0], [masks.PAD] * 2)
    tokens, positions, rank, segment = (np.concatenate(parts, axis=-1) for parts in zip(*rows, end, strict=True))
    mask = masks.Mask({"rank": jnp.asarray(rank[None], jnp.int32), "segment": jnp.asarray(segment[None], jnp.int32)})
    packed, _ = forward(params("glm_original"), tokens[None], C, positions=positions[None], mask=mask)
    start = 0
    for (tokens, positions, *_), length, context in zip(rows, lengths, contexts, strict=True):
        prefix = masks.prefix(jnp.array([context], jnp.int32), length)
        alone, _ = forward(params("glm_original"), tokens[None], C, positions=positions[None], mask=prefix)
        assert relative_error(packed[0, start : start + length], alone[0]) <= CONTRACT
        start += length


def test_part_a_is_blind_to_part_b():
    tokens = jnp.asarray(Z["gen_ids"])
    context = int(Z["gen_sep"][0])
    mask, positions = masks.prefix(jnp.array([context], jnp.int32), tokens.shape[1]), jnp.asarray(Z["gen_pos"])
    whole, _ = forward(params("glm_original"), tokens, C, positions=positions, mask=mask)
    other, _ = forward(params("glm_original"), tokens.at[:, context:].set(7), C, positions=positions, mask=mask)
    np.testing.assert_array_equal(whole[:, :context], other[:, :context])


def test_positions_of_a_wrong_shape_are_named():
    with pytest.raises(ValueError, match=r"\[batch, 2, length\].*\(1, 12\)"):
        gx.forward(params("glm_original"), jnp.asarray(Z["gen_ids"]), C, positions=jnp.zeros((1, 12), int))
