"""fill against the original GLM's outputs, and against a search that reruns the whole model for every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

import garrulax as gx
from garrulax import models, sampling
from garrulax.kernels.masks import prefix
from garrulax.sampling.blanks import answer_prompt, part_a
from garrulax.sampling.knobs import knobs_per_prompt
from garrulax.sampling.loop import decode_step
from garrulax.sampling.requests import assemble
from garrulax.sampling.state import grow, prefill

pytestmark = pytest.mark.usefixtures("quick_compilation")
GREEDY = {"temperature": 0}


forward = jax.jit(models.forward, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def full_pass(params, ids, positions, context, config):
    mask = prefix(context, ids.shape[1])
    return models.forward(params, ids, config, positions=positions, mask=mask)[0]


def brute_force(params, config, ids, new, width=96):
    """Greedy answers to all masks: for every token one pass over part A and all answers so far, without a cache."""
    masks = (config.mask, config.sentence_mask, config.generation_mask)
    tokens, first, second = list(ids), list(range(len(ids))), [0] * len(ids)
    answers = []
    for place in [i for i, token in enumerate(ids) if token in masks]:
        made = []
        tokens, first, second = [*tokens, config.sop], [*first, place], [*second, 1]
        while True:
            padded = [np.pad(x, (0, width - len(tokens))) for x in (tokens, first, second)]
            positions = np.stack(padded[1:])[None]
            logits = full_pass(params, padded[0][None], positions, np.array([len(ids)]), config)
            made.append(int(logits[0, len(tokens) - 1].argmax()))
            if made[-1] in (config.eop, config.eos):
                break
            tokens, first, second = [*tokens, made[-1]], [*first, place], [*second, second[-1] + 1]
            if len(made) == new:
                break
        answers.append(made)
    return answers


@pytest.fixture(scope="module")
def glm():
    return tiny.byte_model("glm", layers=1)


def ids_with_blanks(config, blanks, length=30, seed=0):
    ids = np.random.default_rng(seed).integers(0, 250, length)
    ids[np.linspace(2, length - 2, blanks).astype(int)] = config.mask
    return [config.cls, *ids.tolist(), config.eos]


# -- The original's outputs -------------------------------------------------------------------------------------------


def test_prefill_and_cached_steps_give_the_originals_logits():
    config, params, z = oracle.config("glm_original"), oracle.params("glm_original"), oracle.arrays("glm_original")
    params = models.unstack(params)
    split = int(z["gen_sep"][0])
    ids = z["gen_ids"][0].tolist()
    place = ids.index(config.mask)
    knobs = knobs_per_prompt(1, max_new_tokens=8, temperature=0, top_k=0, top_p=1.0, seed=0)
    text = answer_prompt(ids[:split], place, 8, config, "text")
    assert (text.token, list(text.position)) == (ids[split], z["gen_pos"][0, :, split].tolist())
    state = grow(prefill(params, assemble([text], knobs, config), config, sampling.DEFAULT, 64), 64)
    cache = state.cache
    for t in range(split, len(ids)):
        positions = jnp.asarray(z["gen_pos"][:, :, t : t + 1], jnp.int32)
        logits, cache = forward(params, jnp.array([[ids[t]]]), config, positions=positions, cache=cache)
        assert oracle.relative_error(logits[:, 0], z["gen_logits"][:, t]) < 2e-5
    first = jax.jit(decode_step, static_argnames="config")(params, state, config)
    assert int(first.tokens[0, 0]) == z["gen_logits"][0, split].argmax()


def test_greedy_answer_continues_as_the_original_would():
    config, params, z = oracle.config("glm_original"), oracle.params("glm_original"), oracle.arrays("glm_original")
    ids = z["gen_ids"][0, : int(z["gen_sep"][0])].tolist()
    filled = gx.fill((params, config), ids, max_new_tokens=12, **GREEDY)
    assert [span.tokens for span in filled.spans] == brute_force(params, config, ids, 12)
    assert filled.text is None


# -- Several blanks ---------------------------------------------------------------------------------------------------


def test_four_blanks_are_filled_as_by_full_passes(glm):
    config, params = glm.config, glm.params
    ids = ids_with_blanks(config, 4)
    free = brute_force(params, config, ids, 8)
    # Some answers shall end by themselves, others by their length: make a token of the second answer the end.
    config = dataclasses.replace(config, eop=free[1][3])
    wanted = brute_force(params, config, ids, 8)
    ended = [made[-1] == config.eop for made in wanted]
    assert any(ended)
    assert not all(ended)
    filled = gx.fill((params, config), ids, max_new_tokens=8, **GREEDY)
    assert [span.tokens for span in filled.spans] == wanted
    assert [span.finish_reason for span in filled.spans] == ["eos" if end else "length" for end in ended]
    spans, rest = iter(wanted), []
    for token in ids:
        rest += [t for t in next(spans) if t != config.eop] if token == config.mask else [token]
    assert filled.tokens == rest


def test_random_numbers_are_counted_over_the_whole_row(glm):
    """The number of a token's noise is that of the tokens before it: the text, [sop]s and answers."""
    config = glm.config
    flat = jax.tree.map(jnp.zeros_like, glm.params)  # every token is as likely as the others
    spans = gx.fill((flat, config), [config.mask, 5, config.mask], max_new_tokens=4, seed=1).spans
    before = len(part_a([config.mask, 5, config.mask], config, None, "").ids)
    for span in spans:
        before += 1  # [sop]
        numbers = before + jnp.arange(len(span.tokens))
        seeds = jnp.ones(len(span.tokens), jnp.uint32)
        assert (
            span.tokens == sampling.transforms.sample(jnp.zeros((len(numbers), config.vocab)), seeds, numbers).tolist()
        )
        before += len(span.tokens)


def test_texts_with_different_numbers_of_blanks_share_a_batch(glm):
    config = dataclasses.replace(
        glm.config, eop=brute_force(glm.params, glm.config, ids_with_blanks(glm.config, 3), 5)[0][2]
    )
    model = (models.unstack(glm.params), config)
    texts = [ids_with_blanks(config, n, length, seed=length) for n, length in ((1, 40), (3, 30), (2, 9))]
    knobs = {"temperature": [0, 1.0, 1.3], "seed": [0, 4, 5], "top_k": [0, 0, 20], "max_new_tokens": [9, 5, 7]}
    together = gx.fill(model, texts, **knobs)
    assert [len(filled.spans) for filled in together] == [1, 3, 2]
    for i, text in enumerate(texts):
        alone = gx.fill(model, text, **{k: v[i] for k, v in knobs.items()})
        assert alone.tokens == together[i].tokens
        assert [s.tokens for s in alone.spans] == [s.tokens for s in together[i].spans]


# -- Text -------------------------------------------------------------------------------------------------------------

TEXT = "The capital of [MASK] lies on [MASK]. It is[sMASK]"


def test_how_a_text_becomes_part_a(glm):
    config = glm.config
    part = part_a(TEXT, config, glm.tokenizer, "text")
    ids = [config.cls, *b"The capital of", config.mask, *b" lies on", config.mask, *b". It is", config.sentence_mask]
    assert part.ids == [*ids, config.eos]
    assert [part.ids[i] for i in part.mask_indices] == [config.mask, config.mask, config.sentence_mask]
    assert part.literals == ["The capital of", " lies on", ". It is", ""]
    assert part.space_before == [True, True, False]
    assert part_a("So [gMASK]", config, glm.tokenizer, "text").ids == [config.cls, *b"So", config.generation_mask]
    plain = dataclasses.replace(config, sentence_mask=None, generation_mask=None)
    assert part_a("a[sMASK]b", plain, glm.tokenizer, "text").ids == [config.cls, 97, config.mask, 98, config.eos]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stop", [(), "s"])
def test_a_stream_is_fills_text(glm, every, stop):
    knobs = {"max_new_tokens": 12, "seed": 3, "temperature": 1.5, "stop": stop}
    filled = gx.fill(glm, TEXT, **knobs)
    pieces, last = tiny.drained(gx.fill_stream(glm, TEXT, every=every, **knobs))
    assert last == filled
    assert "".join(pieces) == filled.text == str(filled)
    assert pieces[0] == "The capital of"
    spans = [span.text for span in filled.spans]
    for i in (0, 1):  # the space before a blank is the answer's; the text has it once
        spans[i] = f" {spans[i]}" if spans[i] and not spans[i][0].isspace() else spans[i]
    assert filled.text == f"The capital of{spans[0]} lies on{spans[1]}. It is{spans[2]}"
    if stop:
        assert not any("s" in span for span in spans)


def test_what_follows_a_stop_string_is_not_seen_by_later_blanks(glm):
    text, knobs = "Say [MASK] and [MASK].", {"max_new_tokens": 10, **GREEDY}
    free = gx.fill(glm, text, **knobs).spans[0]
    letter = free.text[4]
    stopped = gx.fill(glm, text, stop=letter, **knobs).spans
    assert stopped[0].text == free.text[: free.text.index(letter)]
    assert stopped[0].finish_reason == "stop"
    cut = gx.fill(glm, text, **{**knobs, "max_new_tokens": len(stopped[0].tokens)}).spans
    assert cut[0].tokens == stopped[0].tokens
    same = min(len(cut[1].tokens), len(stopped[1].tokens))
    assert cut[1].tokens[:same] == stopped[1].tokens[:same]


def test_a_glm_continues_a_text_by_its_last_blank(glm):
    out = gx.generate(glm, "So it is", max_new_tokens=8, seed=2)
    ids = [glm.config.cls, *b"So it is", glm.config.generation_mask]
    assert out == gx.fill(glm, ids, max_new_tokens=8, seed=2).spans[0]
    assert out.text == "".join(gx.stream(glm, "So it is", max_new_tokens=8, seed=2))
    with pytest.raises(ValueError, match=r"prompt 0 has blanks: gx\.fill"):
        gx.generate(glm, "So [MASK] is")


def test_bad_input_is_named(glm):
    with pytest.raises(ValueError, match=r"text 0 has no blank: put \[MASK\]"):
        gx.fill(glm, "no blank")
    for name, why in {"constrain": "it takes no constraint", "speculate": "it reads", "adapter": "it writes"}.items():
        with pytest.raises(ValueError, match=f"fill has no argument '{name}': {why}"):
            gx.fill(glm, "a [MASK]", **{name: "anything"})
    with pytest.raises(ValueError, match="guidance_scale goes with"):
        gx.fill(glm, "a [MASK]", guidance_scale=2)
    with pytest.raises(ValueError, match="text 1 has no blank"):
        gx.fill(glm, ["a [MASK]", ""])
    with pytest.raises(ValueError, match="has 100 tokens, but the model's context is 96"):
        gx.fill(glm, "x" * 97 + "[MASK]")
    with pytest.raises(ValueError, match="max_new_tokens=96 does not fit"):
        gx.fill(glm, "x[MASK]", max_new_tokens=96)
    with pytest.raises(ValueError, match="text 0 has token id 999"):
        gx.fill(glm, [glm.config.mask, 999])
    with pytest.raises(ValueError, match="no tokenizer"):
        gx.fill((glm.params, glm.config), "x[MASK]")
    with pytest.raises(ValueError, match="fill_stream takes one text"):
        gx.fill_stream(glm, ["a[MASK]", "b[MASK]"])
    with pytest.raises(TypeError, match="fill needs a GLM, which is trained on blanks; a gpt model continues texts"):
        gx.fill(tiny.byte_model("gpt", layers=1), "x[MASK]")
