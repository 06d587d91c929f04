"""Batches of blanks for GLM-130B and ChatGLM-6B: the layouts of the published code, and the mix of the paper."""

import jax
import numpy as np
import pytest
import training
from oracle import arrays, config
from test_models_glm130b import FIRST

from garrulax import models
from garrulax.cli.starting import fit
from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.kernels import masks
from garrulax.train import batches, settings
from garrulax.train.infill import GLM_130B, infill_batch
from garrulax.train.infill_tokens import InfillTokens
from garrulax.train.objectives import mask_of
from garrulax.train.rows import Example, infill_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKENIZER = ByteTokenizer(GLM_SPECIALS)


@pytest.mark.parametrize(("case", "kind"), FIRST)
def test_rows_are_those_that_the_published_code_reads(case, kind):
    c, z = config(case), arrays(case)
    ids, wanted = z[f"{kind}_ids"][0].tolist(), z[f"{kind}_pos"][0]
    split = ids.index(c.sop)
    text, answer = ids[:split], ids[split + 1 :]
    place = text.index(c.mask if kind == "mask" else c.generation_mask)
    source = np.array([*text[:place], *answer, *text[place + 1 :]])
    found = InfillTokens.of_blanks(TOKENIZER, models.blanks(c))
    goes_on = kind == "gmask" and found.goes_on
    example = Example(source, [(place, place + len(answer))], text[place], found.start, found.end, goes_on=goes_on)
    batch = infill_rows([[example]], len(ids), pad=0)
    assert batch["tokens"][0].tolist() == ids
    assert batch["targets"][0, split:].tolist() == [*answer, c.eop]
    np.testing.assert_array_equal(batch["positions"][0, : found.rows], np.atleast_2d(wanted))
    mask = mask_of({name: batch[name] for name in ("tokens", "rank", "segment")})
    np.testing.assert_array_equal(masks.Mask(mask.query, rule=mask.rule).dense(), ~z[f"{kind}_mask"][:, 0])


def test_the_mix_of_glm_130b():
    ids = InfillTokens.of_blanks(TOKENIZER, models.blanks(settings.read_settings(None, training.GLM_130B)[1]))
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 200, (4000, 100)).astype(np.int32)
    batch = infill_batch(windows, range(4000), 7, ids, 140, GLM_130B)
    assert batch["positions"].shape == (4000, 140)
    context = (batch["rank"] == 0) & (batch["segment"] == 0)
    is_long = ((batch["tokens"] == ids.document_mask) & context).any(1)
    assert is_long.mean() == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / 4000))
    assert not ((batch["tokens"] == ids.sentence_mask) & context).any()
    # Short blanks: lengths of a Poisson(3) law without 0, whose sum reaches 15 % of the text.
    starts = (batch["tokens"] == ids.start)[~is_long].sum()
    hidden = batch["weights"][~is_long].sum() - starts
    assert hidden / starts == pytest.approx(3 / (1 - np.exp(-3)), rel=0.03)
    assert 15 <= hidden / (~is_long).sum() < 18
    # The rest of a text: its length is uniform over 1..99, so quarters of the rows have quarters of the lengths.
    lengths = batch["weights"][is_long].sum(1)
    assert lengths.min() >= 1
    assert lengths.max() <= 99
    counts = np.histogram(lengths, bins=[0, 25, 50, 75, 100])[0] / len(lengths)
    np.testing.assert_allclose(counts, [0.2525, 0.2525, 0.2525, 0.2525], atol=4 * np.sqrt(0.19 / len(lengths)) + 0.01)
    first = np.where(batch["weights"] > 0, batch["positions"], 999).min(1)
    assert (first[is_long] == context[is_long].sum(1)).all(), "positions go on behind [gMASK]"
    # a first token of a text is hidden as often as others are
    assert ((batch["tokens"][:, 0] == ids.mask) & ~is_long).sum() > 50


PRESETS = {"glm-130b": training.GLM_130B, "chatglm-6b": training.CHATGLM}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_gets_the_tokens_of_its_tokenizer(preset):
    s, c = settings.read_settings(None, [f"preset={preset}", *training.SIZES[:-1], "model.mlp_width=32", "window=32"])
    c = fit(c, s, TOKENIZER)
    assert (c.mask, c.generation_mask, c.sop, c.vocab) == (258, 260, 261, TOKENIZER.vocab)
    assert (c.eos, c.eop, c.sentence_mask) == ((256, 262, 259) if preset == "glm-130b" else (None, 256, None))
    s, _ = settings.read_settings(None, [*PRESETS[preset], *training.SHORT])
    batch = batches.make_data(training.TEXT, s, c, TOKENIZER).batch_at(0)
    assert batch["positions"].ndim == (2 if preset == "glm-130b" else 3)
    assert batch["weights"].sum(1).min() >= 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("packing", ["cut", "first_fit"])
def test_a_preset_is_trained_and_resumed_exactly(preset, packing, tmp_path):
    words = ["steps=4", f"packing={packing}", "schedule=constant", "warmup=0"]
    whole, _ = training.train(tmp_path / "whole", words, PRESETS[preset])
    training.train(tmp_path / "parts", [*words, "steps=2"], PRESETS[preset])
    parts, _ = training.train(tmp_path / "parts", [*words, "tail_step=0"], PRESETS[preset], resume=True)
    assert whole.evaluation.bits_per_byte > 0
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
