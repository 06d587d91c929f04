"""Watermarks: the documented numbers, computed again in NumPy; the distribution of marked texts; the detector.

benchmarks/watermark.py measures them on a real model, tests/parity/test_watermark.py compares the detector's score.
"""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiny import byte_model, drained

import garrulax as gx
from garrulax.cli import main
from garrulax.sampling import detect, transforms
from garrulax.sampling.transforms import watermarks

pytestmark = pytest.mark.usefixtures("quick_compilation")
MARKING = transforms.watermarking()
WORD = 2**32


def threefry2x32(key, counter):
    """Salmon et al. 2011, 20 rounds, in Python integers."""
    k = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (counter[0] + k[0]) % WORD, (counter[1] + k[1]) % WORD
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = (x + y) % WORD
            y = ((y << turn | y >> (32 - turn)) % WORD) ^ x
        x, y = (x + k[(group + 1) % 3]) % WORD, (y + k[(group + 2) % 3] + group + 1) % WORD
    return x, y


def number(mark, context, token):
    """r as docs/watermarks.md defines it."""
    key = (mark.key >> 32, mark.key % WORD)
    for c in context:
        key = threefry2x32(key, (0, c))
    return threefry2x32(key, (0, token))[0]


def state_of(marks, prompts, size=32):
    rows = np.full((len(prompts), max(map(len, prompts))), -1, np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    arrays = jax.tree.map(jnp.asarray, watermarks.as_arrays(marks))
    return MARKING.init({"watermark": arrays, "prompt": jnp.asarray(rows), "size": size})


def test_the_numbers_are_threefry_of_key_context_and_token():
    known = [  # of the authors' library Random123, kat_vectors
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((WORD - 1, WORD - 1), (WORD - 1, WORD - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    assert all(threefry2x32(key, counter) == wanted for key, counter, wanted in known)
    assert gx.watermark("key").key == 0x2C70E12B7A0646F9  # of SHA-256
    for h, key in ((1, 0), (4, "a secret"), (8, 2**64 - 1)):
        mark = gx.watermark(key, context=h)
        ngrams = np.random.default_rng(h).integers(0, 2**31, (5, h + 1))
        wanted = [number(mark, ngram[:-1].tolist(), int(ngram[-1])) for ngram in ngrams]
        assert detect.token_numbers(mark, ngrams).tolist() == wanted


def test_each_row_is_marked_by_its_own_watermark():
    """Rows: both schemes, no watermark, a row that is too short, and one whose context was there before."""
    V, text = 40, [7, 3, 11, 3, 5]
    green, short = gx.watermark(3, context=2, gamma=0.4, delta=1.5), gx.watermark("x", context=6)
    gumbel, once = gx.watermark("x", "gumbel", context=3), gx.watermark("x", "gumbel", context=1)
    marks = [green, gumbel, None, short, once, once]
    texts = [text, text, text, text, [*text, 3], text]
    logits = np.random.default_rng(0).normal(size=(6, V)).astype(np.float32)
    logits[:, 30:] = -np.inf
    state = state_of(marks, [row[:-1] for row in texts])
    state = jax.jit(MARKING.observe)(jnp.array([row[-1] for row in texts], jnp.int32), state)
    marked, after = jax.jit(MARKING.update)(logits, state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    is_green = [number(green, [3, 5], t) < 0.4 * WORD for t in range(V)]
    np.testing.assert_allclose(marked[0], logits[0] + 1.5 * np.array(is_green), rtol=1e-6)
    for row, context in ((1, [11, 3, 5]), (5, [5])):
        u = np.array([1 - (number(marks[row], context, t) + 0.5) / WORD for t in range(V)])
        best = np.argmax(logits[row] - np.log(-np.log(u)))
        np.testing.assert_array_equal(marked[row], np.where(np.arange(V) == best, logits[row], -np.inf))
    np.testing.assert_array_equal(marked[2:5], logits[2:5])


def written(mark, table, rows, steps, first, seed=0):
    """Texts [rows, steps] of a Markov chain with logits table [V, V], each with its own watermark or with `mark`."""
    marks = [mark(i) for i in range(rows)]
    state = state_of(marks, [first] * rows, len(first) + steps)

    def step(carry, length):
        token, state = carry
        logits, state = MARKING.update(table[token], state)
        token = transforms.sample(logits, jnp.arange(rows, dtype=jnp.uint32) + seed, jnp.full(rows, length))
        return (token, MARKING.observe(token, state)), token

    lengths = jnp.arange(len(first), len(first) + steps, dtype=jnp.int32)
    run = jax.jit(lambda state: jax.lax.scan(step, (jnp.full(rows, first[-1], jnp.int32), state), lengths)[1])
    return np.asarray(run(state)).T


def test_over_keys_the_gumbel_scheme_samples_from_the_distribution():
    """Three tokens together. In some rows a context comes again: with its noise, so would the token after it."""
    V, rows = 3, 40000
    table = np.random.default_rng(1).normal(size=(V, V))
    tokens = written(lambda i: gx.watermark(i, "gumbel", context=1), jnp.asarray(table, jnp.float32), rows, 3, [2])
    p = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    expected = rows * np.einsum("a,ab,bc->abc", p[2], p, p).ravel()
    counts = np.bincount(tokens @ [V * V, V, 1], minlength=V**3)
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_marked_texts_are_detected():
    """200 tokens of a chain of 2.6 nats a token, each text with its own key; and with the keys of others."""
    table = jnp.asarray(1.5 * np.random.default_rng(0).normal(size=(32, 32)), jnp.float32)
    keys = [gx.watermark(i, watermarks.SCHEMES[i % 2]) for i in range(128)]
    texts = written(keys.__getitem__, table, 128, 200, [1, 2, 3, 4]).tolist()
    found = [gx.detect_watermark(text, key) for text, key in zip(texts, keys, strict=True)]
    assert np.mean([one.z > 4 for one in found]) >= 0.99
    assert max(gx.detect_watermark(text, keys[i - 2]).z for i, text in enumerate(texts)) < 4.5


def test_unmarked_texts_are_not_detected():
    """4,096 texts of 100 random ids, whose n-grams are all different, in one array."""
    mark, other = (gx.watermark("a secret", scheme) for scheme in watermarks.SCHEMES)
    texts = np.random.default_rng(0).integers(0, 2**31, (4096, 100))
    ngrams = np.lib.stride_tricks.sliding_window_view(texts, 5, axis=1)  # [4096, 96, 5]
    numbers = detect.token_numbers(mark, ngrams.reshape(-1, 5)).reshape(4096, 96)
    green, total = (numbers < WORD / 4).sum(axis=1), -np.log((numbers + 0.5) / WORD).sum(axis=1)
    z = {mark: (green - 24) / math.sqrt(18), other: (total - 96) / math.sqrt(96)}
    for i in (0, 1, np.argmax(green)):
        for scheme, values in z.items():
            assert gx.detect_watermark(texts[i].tolist(), scheme).z == pytest.approx(values[i], abs=1e-9)
    for values in z.values():
        assert np.sum(values > 4) <= 4
        assert abs(values.mean()) < 4 / 64
        assert abs(values.std() - 1) < 4 / math.sqrt(2 * 4096)
    assert stats.kstest(total, stats.gamma(96).cdf).pvalue > 1e-4
    assert stats.chisquare(*_binomial_counts(green, 96, 0.25)).pvalue > 1e-4


def _binomial_counts(successes, n, p):
    """How many texts have at most 16, 17, ..., 32 and more successes, and the expected numbers."""
    cuts = np.arange(16, 33)
    expected = np.diff([0, *stats.binom.cdf(cuts, n, p), 1]) * len(successes)
    return np.bincount(np.searchsorted(cuts, successes), minlength=len(cuts) + 1), expected


def test_p_values_are_exact():
    for k, n, p in ((0, 5, 0.25), (40, 100, 0.25), (5, 5, 0.9), (300, 1000, 0.1)):
        assert detect.binomial_tail(k, n, p) == pytest.approx(stats.binom.sf(k - 1, n, p), rel=1e-9)
    for x, n in ((0.5, 1), (120.0, 100), (50.0, 100), (900.0, 196)):
        assert detect.gamma_tail(x, n) == pytest.approx(stats.gamma.sf(x, n), rel=1e-9)
    green, gumbel = gx.watermark(5, context=1), gx.watermark(5, "gumbel", context=1)
    found = gx.detect_watermark([1, 2, 3, 1, 2, 4, 1], green)  # 1 2, 2 3, 3 1, again 1 2, 2 4, 4 1
    numbers = {pair: number(green, [pair[0]], pair[1]) for pair in ((1, 2), (2, 3), (3, 1), (2, 4), (4, 1))}
    assert (found.scored, found.repeated) == (5, 1)
    assert found.statistic == sum(r < WORD / 4 for r in numbers.values())
    found = gx.detect_watermark([1, 2, 3, 1, 2, 4, 1], gumbel)  # the contexts 1, 2, 3 and 4
    first = [numbers[pair] for pair in ((1, 2), (2, 3), (3, 1), (4, 1))]
    assert (found.scored, found.repeated) == (4, 2)
    assert found.statistic == pytest.approx(-sum(math.log((r + 0.5) / WORD) for r in first))


@functools.cache
def model():
    """A model; not made before a test runs."""
    return byte_model(layers=1, eos=256)


LETTERS = "[a-z ]{44}"


def test_each_row_of_a_batch_has_its_own_watermark_under_a_constraint():
    marks, prompts = [gx.watermark("one", delta=4.0), gx.watermark("two", "gumbel")], ["abcd", "wxyz"]
    options = {"max_new_tokens": 50, "seed": 7, "constrain": gx.regex(LETTERS)}
    batch = gx.generate(model(), prompts, watermark=marks, **options)
    for one, prompt, mark in zip(batch, prompts, marks, strict=True):
        pieces, alone = drained(gx.stream(model(), prompt, watermark=mark, **options))
        assert (alone.tokens, alone.logprobs) == (one.tokens, one.logprobs)
        assert "".join(pieces) == one.text
        assert re.fullmatch(LETTERS, one.text)
    z = [[gx.detect_watermark(one.text, mark, model().tokenizer).z for one in batch] for mark in marks]
    assert [[value > 4 for value in row] for row in z] == [[True, False], [False, True]]


def test_the_commands(tmp_path, capsys):
    gx.save(gx.Model(model().config, model().params, model().tokenizer), tmp_path)
    words = ["--regex", LETTERS, "--max-new-tokens", "50", "--watermark-scheme", "gumbel", "--no-cache"]
    assert main(["generate", str(tmp_path), "abcd", "--watermark", "my key", "--temperature", "1", *words]) == 0
    text = capsys.readouterr().out.strip("\n").removeprefix("abcd")
    z = {}
    for key in ("my key", "other"):
        assert main(["detect", str(tmp_path), "--text", text, "--key", key, "--scheme", "gumbel", "--json"]) == 0
        z[key] = json.loads(capsys.readouterr().out)["z"]
    assert z["my key"] > 4 > 3.5 > z["other"]
    words = ["--regex", LETTERS, "--max-new-tokens", "50", "--temperature", "1", "--no-cache", "--watermark", "my key"]
    mark = ["--watermark-gamma", "0.5", "--watermark-delta", "6", "--watermark-context", "2"]
    assert main(["generate", str(tmp_path), "abcd", *words, *mark]) == 0
    text = capsys.readouterr().out.strip("\n").removeprefix("abcd")
    for name, options in (("as written", ["--gamma", "0.5", "--context", "2"]), ("otherwise", [])):
        assert main(["detect", str(tmp_path), "--text", text, "--key", "my key", "--json", *options]) == 0
        z[name] = json.loads(capsys.readouterr().out)["z"]
    assert z["as written"] > 5 > 3.5 > z["otherwise"]
    assert main(["detect", str(tmp_path), "--text", "abcdefgh", "--key", "k"]) == 0
    assert re.match(r"tokens scored 4 \(.* 0\), green tokens \d\nz -?\d", capsys.readouterr().out)
    assert main(["detect", str(tmp_path), "--text", "abc", "--key", "k"]) == 2
    assert "3 tokens" in capsys.readouterr().err
    refused = {
        "--watermark-gamma is for green lists": [*words, "--watermark-scheme", "gumbel", "--watermark-gamma", "0.5"],
        "--watermark-delta is for green lists": [*words, "--watermark-scheme", "gumbel", "--watermark-delta", "1"],
        "--watermark-context needs a key": [*words[:-2], "--watermark-context", "2"],
        "context=9 must be": [*words, "--watermark-context", "9"],
    }
    for message, options in refused.items():
        assert main(["generate", str(tmp_path), "abcd", *options]) == 2
        assert message in capsys.readouterr().err
    words = ["--text", "abcdefgh", "--key", "k", "--scheme", "gumbel", "--gamma", "0.5"]
    assert main(["detect", str(tmp_path), *words]) == 2
    assert "--gamma is for green lists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: gx.watermark("k", "gumbel", delta=1.0), ValueError, "delta is for green lists: leave it out"),
        (lambda: gx.watermark("k", "red"), ValueError, "'green' or 'gumbel'"),
        (lambda: gx.watermark("k", gamma=0), ValueError, "gamma=0 must be above 0 and below 1"),
        (lambda: gx.watermark("k", gamma=1.0), ValueError, r"gamma=1\.0"),
        (lambda: gx.watermark("k", gamma=math.nan), ValueError, "gamma=nan"),
        (lambda: gx.watermark("k", delta=0), ValueError, "delta=0 must be above 0 and finite"),
        (lambda: gx.watermark("k", delta=math.inf), ValueError, "delta=inf"),
        (lambda: gx.watermark("k", delta="much"), ValueError, "delta=.much. must be a number"),
        (lambda: gx.watermark("k", context=0), ValueError, "context=0 must be a whole number from 1 to 8"),
        (lambda: gx.watermark("k", context=1.5), ValueError, r"context=1\.5"),
        (lambda: gx.watermark(1.5), TypeError, r"not 1\.5"),
        (lambda: gx.watermark(""), TypeError, "not empty"),
        (lambda: gx.watermark(-1), ValueError, "from 0 to"),
        (lambda: gx.detect_watermark([1, 2, 3, 4], gx.watermark("k")), ValueError, "4 tokens.* more than 4"),
        (lambda: gx.detect_watermark([1, 2, 3, 4, -5], gx.watermark("k")), ValueError, "id -5"),
        (lambda: gx.detect_watermark("a text", gx.watermark("k")), ValueError, "no tokenizer"),
        (lambda: gx.detect_watermark([1] * 9, "k"), TypeError, r"gx\.watermark\(key\)"),
        (lambda: generated(watermark="k"), ValueError, r"what gx\.watermark\(key\) returns"),
        (lambda: generated(watermark=gx.watermark("k"), temperature=0), ValueError, "temperature=0 leaves one"),
        (lambda: generated(watermark=gx.watermark("k", "gumbel"), search=gx.beam(2)), ValueError, 'scheme="green"'),
    ],
)
def test_bad_input(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def generated(**options):
    return gx.generate(model(), "abcd", max_new_tokens=2, **options)
