"""generate and fill of GLM-130B and ChatGLM-6B against full passes with the published positions and masks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.kernels.masks import prefix
from garrulax.sampling.blanks import part_a

GREEDY = {"temperature": 0}
TEXT = [50, 74, 34, 13, 23, 63, 46]
NEVER = 999  # no id of the models


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.partial(jax.jit, static_argnames="config")
def full_pass(params, ids, positions, context, config):
    return models.forward(params, ids, config, positions=positions, mask=prefix(context, ids.shape[1]))[0]


def published(name, size, place, generation, length):
    """Positions of a text of `size` with what follows it, as in chatglm-6b and GLM-130B generate.py."""
    first, second = np.arange(length), np.zeros(length, int)
    second[size:] = np.arange(length - size) + 1
    if name == "chatglm":
        first[size:] = place
        return np.stack([first, second])
    if not generation:
        first[size:] = place
    return first


def by_full_passes(model, ids, place, new, begun=(), width=40):
    """Greedy answer to the mask at `place`: for every token one pass over everything, without a cache."""
    params, config = model
    name = "chatglm" if config.positions_2d else "glm130b"
    tokens, made = [*ids, config.sop, *begun], []
    positions = published(name, len(ids), place, ids[place] == config.generation_mask, width)[None]
    while len(made) < new:
        row = np.pad(tokens, (0, width - len(tokens)))[None]
        logits = full_pass(params, row, positions, np.array([len(ids)]), config)
        made.append(int(logits[0, len(tokens) - 1].argmax()))
        tokens.append(made[-1])
        if made[-1] in (config.eop, config.eos):
            break
    return made


@functools.cache
def model_of(name):
    """The oracles' weights, the layers stronger and in GLM-130B with a head: or they would repeat themselves."""
    case = {"chatglm": "chatglm1_ref", "glm130b": "glm130b"}[name]
    config = dataclasses.replace(oracle.config(case), tied=False, eop=NEVER, alpha_layers=1, dialect="glm-130b")
    params = oracle.params(case)
    params = {"head": jax.random.normal(jax.random.key(0), params["tokens"].shape), **params}
    scale = {"chatglm": 10.0, "glm130b": 3.0}[name]
    specs = models.glm130b.parameters(config)
    return spec.map_specs(lambda s, x: x * (scale if s.role == "matrix" else 1), specs, params), config


NAMES = pytest.mark.parametrize("name", [pytest.param("chatglm", marks=pytest.mark.slow), "glm130b"])


@NAMES
def test_generate_answers_a_last_gmask(name):
    model = model_of(name)
    config = model[1]
    ids = [*TEXT, config.generation_mask]
    wanted = by_full_passes(model, ids, 7, 12)
    assert len(set(wanted)) > 4, "a text that repeats itself tests little"
    for prompt in (TEXT, ids, [*ids, config.sop]):
        assert gx.generate(model, prompt, max_new_tokens=12, **GREEDY).tokens == wanted
    begun = gx.generate(model, [*ids, config.sop, *wanted[:4]], max_new_tokens=8, **GREEDY)
    assert begun.tokens == wanted[4:]


@NAMES
def test_generate_answers_a_mask_in_the_text(name):
    """Also beside a row with [gMASK], which goes first where there are both, and counts on in GLM-130B."""
    model = model_of(name)
    config = model[1]
    inside = [*TEXT[:3], config.mask, *TEXT[3:]]
    both = [*inside[:5], config.generation_mask, *inside[5:7]]
    out = gx.generate(model, [inside, TEXT[:4], [*both, config.sop]], max_new_tokens=9, **GREEDY)
    assert out[0].tokens == by_full_passes(model, inside, 3, 9)
    assert out[1].tokens == by_full_passes(model, [*TEXT[:4], config.generation_mask], 4, 9)
    assert out[2].tokens == by_full_passes(model, both, 5, 9)


def test_the_mode_from_left_to_right():
    """GLM-130B's "unidirectional": [gMASK] <sop> in front of the text, plainly causal with positions 0, 1, 2, ..."""
    params, config = model_of("glm130b")
    ids = [config.generation_mask, config.sop, *TEXT]
    out = gx.generate((params, config), ids, max_new_tokens=8, **GREEDY)
    for made in out.tokens:
        row = np.pad(ids, (0, 40 - len(ids)))[None]
        logits = full_pass(params, row, np.arange(40)[None], np.array([0]), config)
        assert made == int(logits[0, len(ids) - 1].argmax())
        ids.append(made)


def filled_by_full_passes(model, ids, new):
    """GLM-130B generate.py fill_blanks: the answer to the first mask goes into the text, which is read again."""
    config, whole, answers = model[1], ids, []
    for at in [i for i, token in enumerate(ids) if token in (config.mask, config.generation_mask)]:
        place = at + len(whole) - len(ids)
        answers.append(by_full_passes(model, whole, place, new))
        kept = [token for token in answers[-1] if token not in (config.eop, config.eos)]
        whole = [*whole[:place], *kept, *whole[place + 1 :]]
    return answers, whole


@NAMES
def test_fill_puts_every_answer_into_the_text(name):
    params, config = model_of(name)
    ids = [*TEXT[:2], config.mask, *TEXT[2:4], config.mask, TEXT[4], config.generation_mask]
    free, _ = filled_by_full_passes((params, config), ids, 6)
    config = dataclasses.replace(config, eop=free[1][2], eos=NEVER)  # some end, some are cut off
    wanted, whole = filled_by_full_passes((params, config), ids, 6)
    assert {len(made) for made in wanted} > {6}
    shorter = [TEXT[0], config.mask, TEXT[5]]
    out = gx.fill((params, config), [ids, shorter], max_new_tokens=6, **GREEDY)
    assert [span.tokens for span in out[0].spans] == wanted
    assert out[0].tokens == whole
    assert [[span.tokens for span in out[1].spans], out[1].tokens] == [
        *filled_by_full_passes((params, config), shorter, 6)
    ]


def test_a_text_does_not_see_the_others():
    model = model_of("glm130b")
    texts = [[3, model[1].mask, 5, model[1].mask], [7, model[1].generation_mask]]
    knobs = {"max_new_tokens": [6, 4], "temperature": [1.3, 0.9], "seed": [3, 4]}
    for i, filled in enumerate(gx.fill(model, texts, **knobs)):
        assert gx.fill(model, texts[i], **{k: v[i] for k, v in knobs.items()}).tokens == filled.tokens


def test_no_draw_is_made_twice():
    """With one seed, the noise of a blank is not that of the blank before it."""
    params, config = model_of("chatglm")
    flat = (jax.tree.map(jnp.zeros_like, params), config)  # every token is as likely as the others
    spans = gx.fill(flat, [config.mask, 5, config.mask, 6, config.mask], max_new_tokens=5, seed=1).spans
    drawn = gx.generate(flat, [9, 9, 9, 9, config.mask], max_new_tokens=15, seed=1).tokens
    assert [token for span in spans for token in span.tokens] == drawn


@pytest.fixture(scope="module")
def byte_model():
    return tiny.byte_model("glm130b")


def test_texts(byte_model):
    config, knobs = byte_model.config, {"max_new_tokens": 6, "seed": 2}
    assert gx.generate(byte_model, "So", **knobs) == gx.generate(byte_model, [*b"So", config.generation_mask], **knobs)
    assert part_a("a [MASK] b", config, byte_model.tokenizer, "").ids == [97, config.mask, *b" b", config.eos]
    assert part_a("a [MASK]", config, byte_model.tokenizer, "").ids == [97, config.mask]
    bare = dataclasses.replace(config, eos=None)
    assert part_a("[sMASK]b", bare, byte_model.tokenizer, "").ids == [config.sentence_mask, 98]
    text = "It is [MASK] and [MASK]."
    filled = gx.fill(byte_model, text, **knobs)
    pieces, last = tiny.drained(gx.fill_stream(byte_model, text, every=2, **knobs))
    assert last == filled
    assert "".join(pieces) == filled.text
    assert filled.text.startswith("It is")
    with pytest.raises(ValueError, match=r"has blanks: gx\.fill"):
        gx.generate(byte_model, text)
    with pytest.raises(ValueError, match=r"must have a mask before its <sop> \(token id 261\)"):
        gx.generate(byte_model, [1, 2, config.sop])
    with pytest.raises(ValueError, match="one <sop> only"):
        gx.generate(byte_model, [config.mask, config.sop, 3, config.sop])
    with pytest.raises(ValueError, match="prompt 0 has 91 tokens and 6 new ones are asked for"):
        gx.generate(byte_model, [1] * 90, max_new_tokens=6)
    with pytest.raises(ValueError, match="text 0 has 4 tokens and 100 new ones"):
        gx.fill(byte_model, [config.mask, 1, config.mask, 2], max_new_tokens=50)


def test_a_sop_in_ids_of_the_original_glm():
    """Ids that hold [sop] are read as fill reads them."""
    glm = tiny.byte_model("glm")
    ids = [glm.config.cls, *b"So ", glm.config.mask, *b" is", glm.config.eos]
    filled = gx.fill(glm, ids, max_new_tokens=6, seed=2).spans[0]
    assert gx.generate(glm, [*ids, glm.config.sop], max_new_tokens=6, seed=2) == filled
