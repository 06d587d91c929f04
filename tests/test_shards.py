"""Shards: what is in them, that interrupted and concurrent builds leave only whole ones."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from garrulax.hub.tokenizer_training import train_chars
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.train import digests, shard_files
from garrulax.train import shards as module
from garrulax.train.corpus import Corpus
from garrulax.train.digests import DamagedError
from garrulax.train.shards import Dataset, build_shards, default_root, find_shards
from garrulax.train.tokens import Tokens


@pytest.fixture
def corpus(tmp_path):
    lines = [json.dumps({"text": f"document {i} é\n" * (1 + i % 5)}) for i in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return Corpus(tmp_path / "text.jsonl")


class Counting(ByteTokenizer):
    """Knows how often it encoded."""

    calls = 0

    def encode_batch(self, texts):
        Counting.calls += 1
        return super().encode_batch(texts)


def folders(root):
    return sorted(p.name for p in root.iterdir() if p.is_dir())


@pytest.mark.parametrize("shard_tokens", [2**27, 1000, 70])
def test_content(corpus, tmp_path, shard_tokens):
    tokenizer = ByteTokenizer()
    data = build_shards(corpus, tokenizer, tmp_path / "cache", shard_tokens=shard_tokens)
    for name, tokens in (("train", data.train), ("valid", data.valid)):
        documents = list(corpus.split(name))
        expected = [token for d in documents for token in [*d.text.encode(), tokenizer.eos]]
        assert tokens[:].tolist() == expected
        assert len(tokens) == data.tokens[name] == len(expected)
        assert tokens.bytes == data.bytes[name] == sum(len(d.text.encode()) for d in documents)
        assert len(tokens.documents) == len(documents) + 1
        for i in (0, len(documents) // 2, len(documents) - 1):
            start, stop = tokens.documents[i : i + 2]
            assert tokenizer.decode(tokens[start:stop]) == documents[i].text
    files = [p for p in data.folder.iterdir() if p.suffix == ".bin" and p.name.startswith("train")]
    assert len(files) == -(-len(data.train) // shard_tokens)
    assert data.meta["corpus"] == corpus.hash
    assert data.meta["tokenizer"] == tokenizer.fingerprint


def test_tokens_behave_like_one_array():
    whole = np.arange(100, dtype=np.uint16)
    for cuts in ([], [1], [30, 31, 99]):
        tokens = Tokens(np.split(whole, cuts), 0, np.array([0, 100]))
        assert len(tokens) == 100
        assert tokens[7] == 7
        assert tokens[-1] == 99
        for s in (slice(0, 0), slice(28, 33), slice(-5, None), slice(90, 200), slice(2, 90, 7), slice(None, None, -1)):
            np.testing.assert_array_equal(tokens[s], whole[s])
            assert tokens[s].dtype == np.int32
        starts = np.array([0, 25, 29, 90])
        np.testing.assert_array_equal(tokens.windows(starts, 10), starts[:, None] + np.arange(10))
        assert tokens.windows(starts, 10).dtype == np.int32
        with pytest.raises(IndexError):
            tokens[100]
    assert len(Tokens([], 0, np.array([0]))) == 0


def test_wide_vocabularies_use_four_bytes(tmp_path, corpus):
    class Wide(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab = 70000

        def encode_batch(self, texts, *, start=True):
            return [[65536 + b for b in text.encode()] for text in texts]

    data = build_shards(corpus, Wide(), tmp_path / "cache")
    assert data.meta["dtype"] == "<u4"
    assert data.train[:5].tolist() == [65536 + b for b in next(corpus.split("train")).text.encode()[:5]]


def test_reuse_and_what_the_name_depends_on(corpus, tmp_path):
    root = tmp_path / "cache"
    Counting.calls = 0
    first = build_shards(corpus, Counting(), root)
    calls = Counting.calls
    assert calls > 0
    again = build_shards(Corpus(corpus.sources), Counting(), root)
    assert again.folder == first.folder
    assert Counting.calls == calls, "tokenized again"
    others = [
        build_shards(corpus, ByteTokenizer(("<|endoftext|>", "[MASK]")), root),
        build_shards(Corpus(corpus.sources, fraction=0.1), ByteTokenizer(), root),
        build_shards(corpus, ByteTokenizer(), root, shard_tokens=99),
    ]
    assert len({d.folder for d in [first, *others]}) == 4


def test_long_documents_are_encoded_in_pieces(tmp_path, monkeypatch):
    text = "".join(f"line {i}\n" for i in range(500)) + "x" * 500
    (tmp_path / "a.txt").write_text(text)
    whole = build_shards(Corpus(tmp_path / "a.txt"), ByteTokenizer(), tmp_path / "one")
    monkeypatch.setattr(module, "_PIECE", 100)
    monkeypatch.setattr(module, "_BATCH", 250)
    seen = []
    pieces = build_shards(
        Corpus(tmp_path / "a.txt"), ByteTokenizer(), tmp_path / "two", progress=lambda *now: seen.append(now)
    )
    np.testing.assert_array_equal(pieces.train[:], whole.train[:])
    np.testing.assert_array_equal(pieces.train.documents, [0, len(whole.train)])
    assert [p.text for p in module._pieces([module.Document("a", "ab\n" * 60)])] == ["ab\n" * 33, "ab\n" * 27]
    assert seen[0][1] < seen[1][1]
    assert seen[-1] == ("valid", pieces.valid.bytes, len(text))


SLOW_BUILD = """
import sys, time
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.train import shards
from garrulax.train.corpus import Corpus
shards._BATCH = 1
delay = float(sys.argv[3])
def progress(split, done, total):
    print(split, done, flush=True)
    time.sleep(delay)
data = shards.build_shards(Corpus(sys.argv[1]), ByteTokenizer(), sys.argv[2], progress=progress)
print("folder", data.folder, flush=True)
"""


def build(corpus, root, delay=0.0):
    command = [sys.executable, "-c", SLOW_BUILD, str(corpus.sources[0]), str(root), str(delay)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_leaves_nothing_that_is_used(corpus, tmp_path, death):
    root = tmp_path / "cache"
    process = build(corpus, root, delay=0.05)
    for _ in range(5):
        process.stdout.readline()
    assert len(folders(root)) == 1
    assert folders(root)[0].startswith(".")
    os.kill(process.pid, death)
    process.wait()
    process.stdout.close()
    assert bool(folders(root)) == (death == signal.SIGKILL), "an interrupt tidies up, a kill cannot"
    data = build_shards(corpus, ByteTokenizer(), root)
    assert folders(root) == [data.folder.name]
    assert len(data.train) == data.train.bytes + len(data.train.documents) - 1


@pytest.mark.slow
def test_concurrent_builders_share_one_result(corpus, tmp_path):
    root = tmp_path / "cache"
    processes = [build(corpus, root, delay=0.002) for _ in range(3)]
    outputs = [p.communicate()[0].splitlines() for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0]
    assert len({out[-1] for out in outputs}) == 1
    assert sum(len(out) > 1 for out in outputs) == 1, "one builds, the others wait"
    assert len(folders(root)) == 1
    assert Dataset(root / folders(root)[0]).valid.bytes == sum(len(d.text.encode()) for d in corpus.split("valid"))


def test_errors(corpus, tmp_path):
    with pytest.raises(ValueError, match="several documents but the tokenizer no end-of-text token"):
        build_shards(corpus, train_chars("document 0123456789é\n"), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"text\.jsonl:\d+: the tokenizer cannot encode .*'é'"):
        build_shards(corpus, train_chars("document 0123456789\n", specials=("<|endoftext|>",)), tmp_path / "cache")
    assert folders(tmp_path / "cache") == []
    (tmp_path / "one.txt").write_text("abc\n" * 50)
    single = build_shards(Corpus(tmp_path / "one.txt"), train_chars("abc\n"), tmp_path / "cache")
    assert len(single.train) == single.train.bytes == 180

    with pytest.raises(FileNotFoundError, match="no data set at"):
        Dataset(tmp_path)
    digests.write(single.folder, single.meta | {"format": 99}, "meta.json")
    with pytest.raises(ValueError, match="data format 99"):
        Dataset(single.folder)


def test_damage_is_named_and_mended(tmp_path):
    (tmp_path / "one.txt").write_text("abc\n" * 50)
    arguments = Corpus(tmp_path / "one.txt"), train_chars("abc\n"), tmp_path / "cache"
    whole = build_shards(*arguments)
    files = {file.name: file.read_bytes() for file in whole.folder.iterdir()}
    assert len(files) == 5

    def flipped(content):
        return content[:99] + bytes([content[99] ^ 4]) + content[100:]

    for name, damage in [("train-00000.bin", flipped), ("train-00000.bin", lambda content: content[:-2]),
                         ("valid-00000.bin", lambda content: content[:40] + b"x" + content[41:]),
                         ("train.documents", lambda content: b"\1" + content[1:]),
                         *(("meta.json", lambda content, i=i: content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
                           for i in range(5, len(files["meta.json"]), 40) if files["meta.json"][i] != 32),
                         ("meta.json", None), ("valid.documents", None)]:  # fmt: skip
        if damage is None:
            (whole.folder / name).unlink()
        else:
            (whole.folder / name).write_bytes(damage(files[name]))
        with pytest.raises(DamagedError, match=rf"{name}.*: delete .* to make the token ids anew"):
            Dataset(whole.folder)
        with pytest.raises(DamagedError, match=name):
            find_shards(whole.meta["corpus"], *arguments[1:])
        said = []
        build_shards(*arguments, say=said.append)
        assert len(said) == 1
        assert name in said[0]
        assert {file.name: file.read_bytes() for file in whole.folder.iterdir()} == files
    assert folders(tmp_path / "cache") == [whole.folder.name]
    for file in whole.folder.iterdir():  # as a cleaner of old files does, which leaves the folder
        file.unlink()
    with pytest.raises(DamagedError, match="it has no token ids"):
        find_shards(whole.meta["corpus"], *arguments[1:])
    build_shards(*arguments, say=said.append)
    assert "it has no token ids: the token ids are made again" in said[-1]
    assert {file.name: file.read_bytes() for file in whole.folder.iterdir()} == files
    other = whole.folder.rename(tmp_path / "cache" / "other")
    digests.write(other, whole.meta | {"eos": 7}, "meta.json")
    other.rename(whole.folder)
    with pytest.raises(DamagedError, match="of another text or tokenizer"):
        find_shards(whole.meta["corpus"], *arguments[1:])


def test_a_full_disk_leaves_nothing(corpus, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_files, "_to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        build_shards(corpus, ByteTokenizer(), tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "shards"
    monkeypatch.delenv("GARRULAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root() == tmp_path / "xdg" / "garrulax" / "shards"
