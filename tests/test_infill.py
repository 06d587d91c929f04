"""Blank infilling against the arrays that THUDM/GLM's own code produced, and its statistics against their laws."""

import itertools
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from garrulax.hub.tokenizers import GLM_SPECIALS, GPT_SPECIALS, ByteTokenizer
from garrulax.train.components import causal_batch
from garrulax.train.infill import BlankMix, infill_batch, sentence_spans, source_window, token_spans
from garrulax.train.infill_tokens import InfillTokens
from garrulax.train.rows import Example, infill_rows

ORACLE = Path(__file__).parent / "oracles" / "glm_original_s0.npz"
MODES = ["token", "token_noshuffle", "token_dblock", "sentence", "document", "document_midspan"]
EOS, SOP, EOP, CLS, MASK, GMASK, SMASK, DBLOCK = 100, 101, 102, 103, 104, 107, 108, 109  # the oracle's ids
ENDS = np.isin(np.arange(128), np.arange(10, 100, 10))
IDS = InfillTokens(CLS, MASK, SMASK, GMASK, SOP, EOP, EOS, EOS, ENDS, DBLOCK)
ONLY = {"token": BlankMix(1, 0, 0), "sentence": BlankMix(0, 1, 0), "document": BlankMix(0, 0, 1)}


def oracle_spans(text, sep, pos, size):
    """The spans of an oracle row in part B's order, and where part B has them: from its text and positions alone."""
    at = np.flatnonzero(text[sep:size] == SOP) + sep
    sizes = np.diff([*at, size]) - 1
    if text[sep - 1] == GMASK:  # the rest of the text is missing; its last token is only a target
        sizes = sizes + 1
    place = pos[0, at]  # of the span's mask in the corrupted text
    begin = [int(p + sizes[place < p].sum() - (place < p).sum()) for p in place]
    return [(b, b + int(n)) for b, n in zip(begin, sizes, strict=True)], at


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_those_of_the_original_code(mode):
    z = {k: np.load(ORACLE)[f"{mode}_{k}"] for k in ("source", "text", "target", "loss_mask", "pos", "sep")}
    mask = {"sentence": SMASK, "document": GMASK, "document_midspan": GMASK}.get(mode, MASK)
    rows = []
    for row in range(3):
        source, text, sep, pos = z["source"][row], z["text"][row], int(z["sep"][row]), z["pos"][row]
        spans, at = oracle_spans(text, sep, pos, int(np.flatnonzero(z["loss_mask"][row])[-1]) + 1)
        inputs = source.copy()
        for (begin, stop), start in zip(spans, at, strict=True):
            blocked = np.flatnonzero(text[start + 1 : start + 1 + stop - begin] == DBLOCK)
            inputs[begin + blocked] = DBLOCK
        rows.append([Example(source, spans, mask, SOP, None if mode == "document" else EOP, inputs)])
    batch = infill_rows(rows, z["text"].shape[1], pad=0)
    np.testing.assert_array_equal(batch["weights"].argmax(1), z["sep"])
    np.testing.assert_array_equal(batch["tokens"], z["text"])
    np.testing.assert_array_equal(batch["targets"], z["target"])
    np.testing.assert_array_equal(batch["weights"], z["loss_mask"])
    np.testing.assert_array_equal(batch["positions"], z["pos"])
    assert (DBLOCK in z["text"]) == (mode == "token_dblock")


def test_worked_example():
    x, y = np.array([1, 2, 3, 4, 5, 6]), np.array([7, 8, 9])
    first = Example(x, [(4, 6), (2, 3)], mask=90, start=91, end=92)
    rest = Example(y, [(1, 3)], mask=93, start=91, end=None, goes_on=True)
    assert (first.length, rest.length) == (10, 4)
    batch = infill_rows([[], [first], [rest, first]], 15, pad=0)
    for row, at in ((1, 0), (2, 4)):
        here = slice(at, at + 10)
        assert batch["tokens"][row, here].tolist() == [1, 2, 90, 4, 90, 91, 5, 6, 91, 3]
        assert batch["targets"][row, here].tolist() == [1, 2, 90, 4, 90, 5, 6, 92, 3, 92]
        assert batch["positions"][row, 0, here].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 2, 2]
        assert batch["positions"][row, 1, here].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
        assert batch["rank"][row, here].tolist() == [0] * 5 + list(range(at + 6, at + 11))
        assert batch["weights"][row, here].tolist() == [0] * 5 + [1] * 5
    assert batch["tokens"][2, :4].tolist() == [7, 93, 91, 8]
    assert batch["targets"][2, :4].tolist() == [7, 93, 8, 9]
    assert batch["positions"][2, :, :4].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert batch["rank"][2, :4].tolist() == [0, 0, 3, 4]
    assert batch["segment"].tolist() == [[-1] * 15, [0] * 10 + [-1] * 5, [0] * 4 + [1] * 10 + [-1]]
    assert not batch["tokens"][0].any()
    with pytest.raises(ValueError, match="a row of 13 tokens cannot hold examples of 14"):
        infill_rows([[rest, first]], 13, pad=0)


def texts(rows, size, seed=0, documents=False):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 100, (rows, size)).astype(np.int32)
    if documents:
        tokens[rng.random((rows, size)) < 0.03] = EOS
    return tokens


def restore(batch, row):
    """The text of one row, rebuilt the way a reader would: every blank filled with the span that points at it."""
    segment = batch["segment"][row] == 0
    part_a = batch["rank"][row] == 0
    outer, inner = batch["positions"][row]
    text = {int(t): [int(batch["tokens"][row, t])] for t in np.flatnonzero(segment & part_a)}
    for t in np.flatnonzero(segment & ~part_a):
        if inner[t] == 1:
            text[int(outer[t])] = []
        text[int(outer[t])].append(int(batch["targets"][row, t]))
    return [token for t in sorted(text) for token in text[t] if token != EOP]


@pytest.mark.parametrize("kind", list(ONLY))
@pytest.mark.parametrize("documents", [False, True])
def test_filling_the_blanks_gives_the_text_back(kind, documents):
    windows = texts(64, 60, documents=documents)
    batch = infill_batch(windows, range(64), 5, IDS, 90, ONLY[kind])
    mask = {"token": MASK, "sentence": SMASK, "document": GMASK}[kind]
    for row in range(64):
        assert restore(batch, row) == [CLS, *windows[row].tolist()]
        part_a = batch["tokens"][row][(batch["rank"][row] == 0) & (batch["segment"][row] == 0)]
        spans = (batch["tokens"][row][batch["rank"][row] > 0] == SOP).sum()
        assert (part_a == mask).sum() == spans > 0
        assert part_a[0] == CLS
        assert part_a[-1] == windows[row, -1] or (kind == "document" and EOP not in batch["targets"][row])
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "tokens": ((64, 90), np.int32), "targets": ((64, 90), np.int32), "weights": ((64, 90), np.float32),
        "positions": ((64, 2, 90), np.int32), "rank": ((64, 90), np.int32), "segment": ((64, 90), np.int32),
    }  # fmt: skip


def test_token_spans_follow_the_paper():
    rng = np.random.default_rng(0)
    source = np.concatenate([[CLS], texts(1, 511)[0]])
    lengths, covered, begins = [], [], np.zeros(512)
    for _ in range(2000):
        spans = token_spans(source, rng, EOS, max_spans=100)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(spans)), "spans touch"
        assert spans[0][0] >= 1
        assert spans[-1][1] <= 511, "the last token is masked"
        lengths += [b - a for a, b in spans]
        covered.append(sum(b - a for a, b in spans))
        for a, b in spans:
            begins[a:b] += 1
    # Drawn until the total reaches int(.15 * 512) = 76, the last one whole.
    assert min(covered) >= 76
    assert np.mean(covered) < 80
    # Poisson(3) without 0: mean 3 / (1 - exp(-3)); stopping at a total favours long last spans by a little.
    assert np.mean(lengths) == pytest.approx(3 / (1 - math.exp(-3)), rel=0.02)
    share = np.bincount(lengths, minlength=12)[1:12] / len(lengths)
    pmf = np.array([3.0**k / math.factorial(k) for k in range(1, 12)]) / (math.exp(3) - 1)
    np.testing.assert_allclose(share, pmf, atol=0.01)
    assert begins[10:500].min() / 2000 > 0.1, "every place is masked alike"
    assert begins[10:500].max() / 2000 < 0.2


def test_token_spans_stay_in_documents_and_within_the_budget():
    rng = np.random.default_rng(1)
    for row in texts(200, 127, documents=True):
        source = np.concatenate([[CLS], row])
        spans = token_spans(source, rng, EOS, max_spans=4)
        assert 1 <= len(spans) <= 4
        for begin, stop in spans:
            assert EOS not in source[begin:stop]
            assert 1 <= begin < stop <= 127


def test_part_b_is_in_random_order():
    batch = infill_batch(texts(300, 110), range(300), 0, IDS, 160, ONLY["token"])
    first = [np.flatnonzero(row == SOP)[:2] for row in batch["tokens"]]
    rising = [batch["positions"][i, 0, a] < batch["positions"][i, 0, b] for i, (a, b) in enumerate(first)]
    assert 0.4 < np.mean(rising) < 0.6


def test_sentence_spans_are_whole_sentences():
    rng = np.random.default_rng(2)
    for row in texts(200, 127, documents=True):
        source = np.concatenate([[CLS], row])
        spans = sentence_spans(source, rng, IDS)
        for begin, stop in spans:
            before, last = source[begin - 1], source[stop - 1]
            assert before in (CLS, EOS) or ENDS[before], "starts where a sentence starts"
            assert ENDS[last] or source[stop] == EOS or stop == 127, "ends where a sentence ends"
            assert not ENDS[source[begin : stop - 1]].any()
            assert EOS not in source[begin:stop]
            assert stop <= 127, "the last token is hidden"
        total = sum(b - a for a, b in spans)
        assert total >= 19
        assert total - (spans[-1][1] - spans[-1][0]) < 19, "one sentence more than needed"


def test_document_blanks_are_suffixes_or_interior():
    batch = infill_batch(texts(400, 62), range(400), 0, IDS, 80, BlankMix(0, 0, 1, document_ratio=0.5))
    eop = (batch["targets"] == EOP).any(1)
    assert 0.4 < eop.mean() < 0.6, "half are interior spans, which end with eop"
    suffix = ~eop
    np.testing.assert_array_equal(batch["targets"][suffix][:, 63 - 1 + 1], texts(400, 62)[suffix][:, -1])
    scored = batch["weights"].sum(1) - eop
    assert scored.min() >= 31
    assert scored.max() <= 61
    several = infill_batch(np.where(np.arange(62) == 30, EOS, texts(50, 62)), range(50), 0, IDS, 80, BlankMix(0, 0, 1))
    assert not (several["targets"] == EOP).any(), "a text of several documents is always continued"


def test_mix_and_block_masks():
    mix = BlankMix(token=0.5, sentence=0.3, document=0.2, block=0.25)
    batch = infill_batch(texts(3000, 60), range(3000), 3, IDS, 90, mix)
    share = [np.mean((batch["tokens"] == mask).any(1)) for mask in (MASK, SMASK, GMASK)]
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.03)
    token_rows = (batch["tokens"] == MASK).any(1)
    part_b = (batch["rank"] > 0) & (batch["tokens"] != SOP)
    blocked = batch["tokens"] == DBLOCK
    assert blocked[token_rows][part_b[token_rows]].mean() == pytest.approx(0.25, abs=0.02)
    assert not blocked[~token_rows].any()
    assert not blocked[~part_b].any()
    assert not (batch["targets"] == DBLOCK).any(), "targets stay"


def test_a_row_depends_on_its_number_and_the_seed_alone():
    windows = texts(16, 60)
    whole = infill_batch(windows, range(32, 48), 9, IDS, 80)
    half = infill_batch(windows[8:], range(40, 48), 9, IDS, 80)
    other = infill_batch(windows, range(32, 48), 10, IDS, 80)
    for name in whole:
        np.testing.assert_array_equal(whole[name][8:], half[name])
    assert (whole["tokens"] != other["tokens"]).any(1).mean() > 0.9


def test_source_window_leaves_room():
    for length in (64, 128, 512, 1024):
        window = source_window(length)
        assert window > 0.8 * length - 10
        batch = infill_batch(texts(200, window + 1), range(200), 0, IDS, length, ONLY["token"])
        eaten = (batch["weights"] > 0).sum(1) - (batch["targets"] == EOP).sum(1)
        assert np.mean(eaten >= int(0.15 * (window + 2))) > 0.97, "spans were given up"


def test_tokens_of_a_tokenizer():
    ids = InfillTokens.of(ByteTokenizer(GLM_SPECIALS))
    assert (ids.eos, ids.cls, ids.mask, ids.sentence_mask, ids.document_mask) == (256, 257, 258, 259, 260)
    assert (ids.start, ids.end, ids.block, ids.pad) == (261, 262, 263, 256)
    assert {chr(i) for i in np.flatnonzero(ids.sentence_ends)} == set(".?!;:\n")
    alike = InfillTokens.of(ByteTokenizer(GLM_SPECIALS), task_mask=False)
    assert alike.mask == alike.sentence_mask == alike.document_mask
    with pytest.raises(ValueError, match=r"lacks: \[CLS\], \[MASK\], \[sMASK\]"):
        InfillTokens.of(ByteTokenizer(GPT_SPECIALS))


def test_bad_input():
    with pytest.raises(ValueError, match="needs 63 or more"):
        infill_batch(texts(1, 60), [0], 0, IDS, 62)
    with pytest.raises(ValueError, match="too short for blank infilling"):
        source_window(16)
    with pytest.raises(ValueError, match="must not be negative"):
        BlankMix(token=-1)
    with pytest.raises(ValueError, match="document_ratio"):
        BlankMix(document_ratio=2)


def test_causal():
    batch = causal_batch(np.arange(10, dtype=np.int32).reshape(2, 5))
    assert batch["tokens"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch["targets"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch["weights"].tolist() == [[1] * 4] * 2


def test_denoisers_of_the_ul2_example():
    example = runpy.run_path(str(ORACLE.parent.parent.parent / "examples" / "ul2.py"), run_name="ul2")
    rng = np.random.default_rng(0)
    for kind, mean, share in example["DENOISERS"]:
        if kind == "S":
            continue
        for _ in range(20):
            spans = example["spans"](rng, mean, share)
            hidden, lengths = round(share * example["TEXT"]), [stop - begin for begin, stop in spans]
            assert sum(lengths) == hidden
            assert min(lengths) >= 1
            assert len(spans) == max(1, round(hidden / mean))
            assert spans[0][0] >= 1
            assert spans[-1][1] < example["TEXT"]
            assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
