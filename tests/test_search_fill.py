"""Beam search in blanks and the order by confidence, against a search that reruns the whole model for every token."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import test_fill_glm130b
import tiny

import garrulax as gx
from garrulax import models
from garrulax.kernels.masks import prefix

pytestmark = pytest.mark.usefixtures("quick_compilation")
BEAMS, NEW, WIDTH = 3, 5, 64


@functools.partial(jax.jit, static_argnames="config")
def full_pass(params, ids, positions, context, config):
    mask = prefix(context, ids.shape[1])
    return jax.nn.log_softmax(models.forward(params, ids, config, positions=positions, mask=mask)[0])


def answers_behind(ids, done):
    """GLM: the text, and the answers so far behind it; each with the position of its mask. For a place, the start."""
    tokens, first, second = list(ids), list(range(len(ids))), [0] * len(ids)
    for place, answer in done:
        tokens, first = [*tokens, *answer], [*first, *[place] * len(answer)]
        second += range(1, len(answer) + 1)
    return tokens, first, second


def inserted(ids, done):
    """GLM-130B: the text with the answers in place of their masks."""
    filled = dict(done)
    return [t for i, token in enumerate(ids) for t in (filled[i][1:] if i in filled else [token])]


def logprobs_behind(model, ids, done, place, partials):
    params, config = model
    rows = [answers_behind(ids, [*done, (place, [config.sop, *partial])]) for partial in partials]
    size, rows = len(rows[0][0]), [[np.pad(x, (0, WIDTH - len(x))) for x in row] for row in rows]
    tokens, first, second = (np.stack(x) for x in zip(*rows, strict=True))
    context = np.full(len(rows), len(ids))
    return np.asarray(full_pass(params, tokens, np.stack([first, second], 1), context, config))[:, size - 1]


def logprobs_inserted(model, ids, done, place, partials):
    params, config = model
    text = inserted(ids, done)
    place = len(inserted(ids[:place], [one for one in done if one[0] < place]))
    generation = text[place] == config.generation_mask
    positions = test_fill_glm130b.published("glm130b", len(text), place, generation, WIDTH)
    rows = [[*text, config.sop, *partial] for partial in partials]
    tokens = np.stack([np.pad(row, (0, WIDTH - len(row))) for row in rows])
    context = np.full(len(rows), len(text))
    positions = np.tile(positions, (len(rows), 1))
    return np.asarray(full_pass(params, tokens, positions, context, config))[:, len(rows[0]) - 1]


def beam_search(next_logprobs, ends):
    """The best sequence: transformers' rules, as written in `gx.beam`."""
    running, finished = [([], 0.0)], []
    for length in range(1, NEW + 1):
        rows = next_logprobs([*(tokens for tokens, _ in running), *[running[0][0]] * (BEAMS - len(running))])
        found = [
            ([*tokens, v], score + row[v])
            for (tokens, score), row in zip(running, rows, strict=False)
            for v in np.argsort(-row)[: BEAMS + len(ends)]
        ]
        found.sort(key=lambda one: -one[1])
        finished += [(t, s / length) for t, s in found[:BEAMS] if t[-1] in ends or length == NEW]
        finished = sorted(finished, key=lambda one: -one[1])[:BEAMS]
        running = [one for one in found if one[0][-1] not in ends][:BEAMS]
        if len(finished) == BEAMS and running[0][1] / length <= finished[-1][1]:
            break
    return finished[0][0]


def by_full_passes(model, ids, logprobs, masks, ends, by_confidence):
    """The answer to each mask."""
    done, left = [], [i for i, token in enumerate(ids) if token in masks]
    answers = {}
    while left:
        sure = [logprobs(model, ids, done, place, [[]] * BEAMS)[0].max() for place in left]
        place = left.pop(int(np.argmax(sure)) if by_confidence else 0)
        found = beam_search(lambda partials, p=place: logprobs(model, ids, done, p, partials), ends)
        answers[place] = [int(t) for t in found]
        kept = found[:-1] if found[-1] in ends else found
        done.append((place, [model[1].sop, *kept]))
    order = [place for place, _ in done]
    return [answers[place] for place in sorted(answers)], order


CASES = [
    pytest.param(family, order, marks=() if (family, order) == ("glm", "confidence") else pytest.mark.slow)
    for family in ("glm", "glm130b")
    for order in ("text", "confidence")
]


@pytest.mark.parametrize(("family", "order"), CASES)
def test_beams_in_blanks(family, order):
    if family == "glm":
        glm = tiny.byte_model("glm")
        model, logprobs = (models.unstack(glm.params), glm.config), logprobs_behind
        texts = [[257, 5, 258, 17, 90, 258, 33, 258, 71, 256], [257, 80, 258, 3, 258, 256]]
    else:
        model, logprobs = test_fill_glm130b.model_of("glm130b"), logprobs_inserted
        mask = model[1].mask
        texts = [[50, mask, 34, 13, mask, 46, model[1].generation_mask], [*test_fill_glm130b.TEXT[:3], mask]]
    config, by_confidence = model[1], order == "confidence"
    masks = (config.mask, config.sentence_mask, config.generation_mask)
    wanted, _ = by_full_passes(model, texts[0], logprobs, masks, (config.eop, config.eos), by_confidence)
    config = dataclasses.replace(config, eop=wanted[0][2])  # so that some answers end by themselves
    model, ends = (model[0], config), (config.eop, *np.ravel(config.eos))
    found = gx.fill(model, texts, max_new_tokens=NEW, search=gx.beam(BEAMS), order=order)
    orders = []
    for text, own in zip(texts, found, strict=True):
        wanted, places = by_full_passes(model, text, logprobs, masks, ends, by_confidence)
        assert [span.tokens for span in own.spans] == wanted
        orders.append(places == sorted(places))
    assert all(orders) != by_confidence
    spans = [span for own in found for span in own.spans]
    assert {span.finish_reason for span in spans} == {"eos", "length"}
    assert all(span.score is not None for span in spans)


@pytest.mark.parametrize("family", ["glm", pytest.param("glm130b", marks=pytest.mark.slow)])
def test_the_best_of_several_fills(family):
    """All answers come from the one of three fills with the next seeds whose tokens are the most probable together."""
    model = tiny.byte_model(family, layers=1)
    mask = model.config.mask
    texts = [[50, mask, 34, 13, mask, 46], [7, 80, mask, 3]]
    found = gx.fill(model, texts, seed=[3, 8], max_new_tokens=[4, 3], search=gx.best_of(3))
    six = [texts[0]] * 3 + [texts[1]] * 3
    fills = gx.fill(model, six, seed=[3, 4, 5, 8, 9, 10], max_new_tokens=[4, 4, 4, 3, 3, 3])
    means = [np.mean([x for span in one.spans for x in span.logprobs]) for one in fills]
    best = int(np.argmax(means[:3])), 3 + int(np.argmax(means[3:]))
    assert [one.tokens for one in found] == [fills[i].tokens for i in best]
    for i, own in zip(best, found, strict=True):
        np.testing.assert_allclose([span.score for span in own.spans], means[i], rtol=1e-6)
    assert best != (0, 3), "the first sample is the best one of both texts"


def test_bad_input_is_named():
    glm = tiny.byte_model("glm")
    for search in (gx.best_of(3, returned=2), gx.beam(3, returned=2)):
        with pytest.raises(ValueError, match=r"fill takes gx\.beam"):
            gx.fill(glm, "a [MASK]", search=search)
    with pytest.raises(ValueError, match=r"gx\.contrastive compares hidden states, which fill does not keep"):
        gx.fill(glm, "a [MASK]", search=gx.contrastive(2, 0.5))
    with pytest.raises(ValueError, match="order='left' must be one of 'text', 'confidence'"):
        gx.fill(glm, "a [MASK]", order="left")
    with pytest.raises(ValueError, match="fill_stream samples from left to right and has no search"):
        gx.fill_stream(glm, "a [MASK]", search=gx.beam(2))
