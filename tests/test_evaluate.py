"""score, perplexity and choose against forward passes of the whole text; the command and the errors."""

import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import garrulax as gx
from garrulax import models
from garrulax.cli import main
from garrulax.evaluate import passes
from garrulax.evaluate.rows import continuation_row
from garrulax.kernels import masks

pytestmark = pytest.mark.usefixtures("quick_compilation")
IDS = np.random.default_rng(0).integers(0, 97, 45).tolist()
LENGTH = 64  # of all forward passes here: one program


@functools.cache
def model_of(name):
    config = tiny.CONFIGS[name]
    return tiny.params(config), config


@functools.partial(jax.jit, static_argnames="config")
def forward(params, tokens, config):
    return models.forward(params, tokens, config)[0]


@functools.partial(jax.jit, static_argnames="config")
def answer_pass(params, tokens, positions, size, config):
    return models.forward(params, tokens, config, positions=positions, mask=masks.prefix(size, tokens.shape[1]))[0]


def by_forward(model, ids):
    """Log-probabilities in float64 of each token but the first, by one pass; and whether each is the argmax."""
    params, config = model
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(ids)] = ids
    logits = np.asarray(forward(params, row, config), np.float64)[0, : len(ids) - 1]
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[np.arange(len(ids) - 1), ids[1:]], logits.argmax(-1) == ids[1:]


@pytest.mark.parametrize("name", ["gpt", pytest.param("llama", marks=pytest.mark.slow)])
def test_score_is_that_of_one_forward_pass(name, monkeypatch):
    """For texts of several lengths, conditions and chunks of the head; not changed by the rest of the batch."""
    monkeypatch.setattr(passes, "CHUNK_LOGITS", 16 * 97)  # several chunks a batch
    model = model_of(name)
    texts, conditions = [IDS[:40], IDS[3:8], IDS[9:10]], [IDS[40:41], IDS[20:30], IDS[4:7]]
    found = gx.score(model, texts, condition=conditions)
    for score, text, condition in zip(found, texts, conditions, strict=True):
        logprobs, greedy = by_forward(model, condition + text)
        np.testing.assert_allclose(score.logprobs, logprobs[len(condition) - 1 :], atol=2e-5)
        assert score.is_argmax == greedy[len(condition) - 1 :].tolist()
        assert score.tokens == text
        assert score.count == len(text)
        assert score.logprob == pytest.approx(logprobs[len(condition) - 1 :].sum(), abs=1e-4)
        assert score.bytes is None
    alone = gx.score(model, texts[1], condition=conditions[1])
    np.testing.assert_allclose(alone.logprobs, found[1].logprobs, atol=2e-6)
    first = gx.score(model, texts[1])
    assert (first.logprobs[0], first.is_argmax[0], first.count) == (None, None, 4)
    every = gx.score(model, [[token] for token in range(model[1].vocab)], condition=IDS[:5])
    likely = int(np.argmax([score.logprob for score in every]))
    assert math.fsum(math.exp(score.logprob) for score in every) == pytest.approx(1, rel=1e-5)
    assert gx.score(model, [likely], condition=IDS[:5]).is_greedy
    assert not gx.score(model, [likely ^ 1], condition=IDS[:5]).is_greedy
    assert gx.score(model, IDS[:1]).count == 0


@pytest.mark.parametrize("length", [1, 2, 8, 9, 12, 13, 45])
@pytest.mark.parametrize("prefix", [(), (7,)])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 3), (5, 1)])
def test_windows_score_each_token_once(length, prefix, window, stride):
    """The targets of all windows are the text, and what each reads ends before them and fits into the window."""
    from garrulax.evaluate.perplexity import _windows

    config = model_of("gpt")[1]
    whole = [*prefix, *range(100, 100 + length)]
    scored = len(prefix) or 1
    for row in _windows(prefix, whole[len(prefix) :], window, stride, config):
        targets = row.targets[row.choice > 0].tolist()
        assert targets == whole[scored : scored + len(targets)]
        assert 1 <= len(row.tokens) <= window
        read = [*row.tokens.tolist(), targets[-1]]
        assert read == whole[scored + len(targets) - len(read) : scored + len(targets)]
        before = len(read) - len(targets)
        assert before >= min(scored, max(window - stride, 1))
        scored += len(targets)
    assert scored == max(len(whole), 1)


def test_perplexity_is_a_plain_loop_over_windows():
    model = model_of("gpt")
    window, stride, nll, done = 12, 5, 0.0, 1
    for begin in range(0, len(IDS), stride):
        end = min(begin + window, len(IDS))
        nll -= by_forward(model, IDS[begin:end])[0][done - begin - 1 :].sum()
        done = end
        if end == len(IDS):
            break
    found = gx.perplexity(model, IDS, window=window, stride=stride)
    assert (found.tokens, found.bytes, found.words) == (len(IDS) - 1, None, None)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll / 44), rel=1e-5)
    both = gx.perplexity(model, [IDS, IDS[:20]], window=window, stride=stride)
    assert both.nll == pytest.approx(nll + gx.perplexity(model, IDS[:20], window=12, stride=5).nll, rel=1e-5)
    assert gx.perplexity(model, IDS[:30]).nll == pytest.approx(-by_forward(model, IDS[:30])[0].sum(), rel=1e-5)


def test_texts_bytes_and_the_end_of_a_condition():
    """Spaces at the end of a condition belong to the text; a prefix lets the first token be scored."""
    model = tiny.byte_model(layers=1)
    text = "é is one  letter"
    found = gx.score(model, text, prefix=[256])
    assert (found.bytes, found.count, found.tokens) == (17, 17, list(text.encode()))
    spaced, plain = gx.score(model, ["b", " b"], condition=["a ", "a"])
    assert spaced.tokens == plain.tokens == [32, 98]
    assert spaced.logprobs == pytest.approx(plain.logprobs, abs=1e-5)
    assert gx.score(model, "bc").count == 1
    ppl = gx.perplexity(model, [text, "two words"], prefix=[256])
    assert (ppl.tokens, ppl.bytes, ppl.words) == (26, 26, 6)
    assert ppl.bits_per_byte == pytest.approx(math.log2(ppl.perplexity))
    assert ppl.word_perplexity == pytest.approx(math.exp(ppl.nll / 6))


def test_choose_divides_as_it_is_told():
    model = tiny.byte_model(layers=1)
    options = [" é", " abc", " z"]
    scores = gx.score(model, options, condition="one")
    sums = [score.logprob for score in scores]
    for normalise, sizes in (("none", (1, 1, 1)), ("tokens", (3, 4, 2)), ("bytes", (3, 4, 2))):
        found = gx.choose(model, "one", options, normalise=normalise)
        assert found.logprobs == pytest.approx(sums, abs=1e-4)
        assert found.scores == pytest.approx([x / n for x, n in zip(sums, sizes, strict=True)], abs=1e-4)
        assert found.index == int(np.argmax(found.scores))


@pytest.mark.parametrize("name", [pytest.param("glm", marks=pytest.mark.slow), "glm130b"])
def test_blanks(name):
    """A text is the answer to [gMASK] behind its condition, and an option the answer to the blank of the prompt."""
    params, config = model_of(name)
    blanks = models.blanks(config)

    def by_pass(ids, at, answer):
        positions, tokens = blanks.positions(ids, at, 16 - len(ids)), np.zeros((1, 16), np.int32)
        tokens[0, : len(ids) + len(answer)] = [*ids, blanks.sop, *answer[:-1]]
        logits = np.asarray(answer_pass(params, tokens, np.squeeze(positions)[None], np.array([len(ids)]), config))
        logprobs = logits[0, len(ids) :] - np.log(np.exp(logits[0, len(ids) :]).sum(-1, keepdims=True))
        return logprobs[np.arange(len(answer)), answer]

    context = [*blanks.before, *IDS[:5], blanks.masks["g"], *(() if "g" in blanks.open_ended else blanks.after)]
    wanted = by_pass(context, len(blanks.before) + 5, IDS[5:9])
    np.testing.assert_allclose(gx.score((params, config), IDS[5:9], condition=IDS[:5]).logprobs, wanted, atol=2e-5)
    whole = gx.score((params, config), IDS[4:9])  # the first token takes the place of a condition
    assert whole.logprobs[0] is None
    assert whole.count == 4
    prompt = [*IDS[:3], blanks.masks[""], *IDS[3:5]]
    found = gx.choose((params, config), prompt, [IDS[7:10], IDS[10:12]])
    sums = [by_pass(prompt, 3, answer).sum() for answer in (IDS[7:10], IDS[10:12])]
    assert found.logprobs == pytest.approx(sums, abs=1e-4)
    windows = gx.perplexity((params, config), IDS[:14], window=10, stride=5)
    halves = gx.score((params, config), IDS[:10]), gx.score((params, config), IDS[10:14], condition=IDS[5:10])
    assert windows.tokens == 13
    assert windows.nll == pytest.approx(-sum(half.logprob for half in halves), rel=1e-5)


def test_texts_around_a_blank():
    """A prompt without a blank gets [MASK], and the space before a blank begins the options."""
    from garrulax.evaluate.choose import _answers

    model = tiny.byte_model("glm", layers=1)
    blanks = models.blanks(model.config)

    def read(prompt, options):
        return _answers(prompt, options, ["an option"] * len(options), None, model.config, model.tokenizer, blanks)

    ids, at, answers = read("It is ", ["so", " no"])
    assert (ids, at, answers) == read("It is [MASK]", ["so", " no"]) == read("It is[MASK]", [" so", " no"])
    assert ids == [model.config.cls, *b"It is", model.config.mask, *blanks.after]
    assert (ids[at], answers) == (model.config.mask, [list(b" so"), list(b" no")])
    assert read([5, 6], [[7]]) == ([5, 6, model.config.mask], 2, [[7]])
    with pytest.raises(ValueError, match="2 blanks"):
        read("[MASK] is [MASK]", ["so"])


def test_the_logits_of_a_batch_never_exist_at_once():
    """V = 151,936 and T = 8,192, whose logits would take 5 GB."""
    config = gx.preset("gpt2-tiny", layers=1, width=16, heads=2, vocab=151_936, context=8192, eos=None)
    params = jax.eval_shape(lambda: gx.init(config, jax.random.key(0)))
    row = continuation_row([1], [2] * 8192, config)
    arrays = passes._assemble([row], 8192, False)
    program = passes._pass.lower(params, *arrays, config, passes._chunk(config.vocab, arrays[3].size)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 500e6


def test_the_command(tmp_path, capsys):
    model = tiny.byte_model(layers=1)
    gx.save(gx.Model(model.config, model.params, model.tokenizer), tmp_path / "model")
    text = "A text of twelve words, which is longer than the window is." * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    file = ["score", str(tmp_path / "model"), str(tmp_path / "text.txt"), "--window", "50"]
    assert main([*file, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    found = gx.perplexity(model, text, window=50)
    assert numbers["nll"] == pytest.approx(found.nll, rel=1e-6)
    assert numbers["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-6)
    assert numbers["tokens"] == len(text) - 1
    assert main(file) == 0
    assert f"{found.perplexity:,.4f}" in capsys.readouterr().out
    assert main([*file[:2], "--text", "two words"]) == 0
    assert main(file[:2]) == 2
    assert "--text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: gx.score(m, ""), "the text is empty"),
        (lambda m: gx.score(m, [[1], []]), "text 1 is empty"),
        (lambda m: gx.score(m, [1, 999]), "id 999"),
        (lambda m: gx.score(m, [1] * 99), "gx.perplexity"),
        (lambda m: gx.score(m, "a", condition=[1]), "both be texts"),
        (lambda m: gx.score(m, ["a", "b"], condition=["c"] * 3), "3 values for 2 texts"),
        (lambda m: gx.score((m.params, m.config), "a"), "no tokenizer"),
        (lambda m: gx.score(m, "ab", batch_tokens=0), "batch_tokens=0"),
        (lambda m: gx.perplexity(m, "abc", window=97), "window=97 must be from 2 to 96"),
        (lambda m: gx.perplexity(m, "abc", window=8, stride=9), "stride=9"),
        (lambda m: gx.perplexity(m, "a"), "no token to score"),
        (lambda m: gx.choose(m, "a", "bc"), "list"),
        (lambda m: gx.choose(m, "a", ["b"], normalise="words"), "choose from none, tokens, bytes"),
        (lambda m: gx.choose(m, "", ["b"]), "prompt is empty"),
        (lambda m: gx.choose((m.params, m.config), [1], [[2]], normalise="bytes"), "have a text"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny.byte_model(layers=1))


def test_logits_that_are_not_finite():
    params, config = model_of("gpt")
    broken = {**params, "norm": jax.tree.map(lambda x: x * jnp.nan, params["norm"])}
    with pytest.raises(FloatingPointError):
        gx.score((broken, config), IDS[:5])


@pytest.mark.slow
def test_the_examples_of_the_page():
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["found"].index in range(3)
    assert names["whole"].count == len("The sun rises.") - 1
