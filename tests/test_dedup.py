"""Copies of documents: exact ones, and near ones against the Jaccard index of all pairs. And texts in object stores."""

import gzip
import sys

import numpy as np
import pytest

from garrulax.train.corpus import Corpus
from garrulax.train.dedup import duplicates, shingles


def test_exact_copies_are_left_out_before_the_split(tmp_path):
    texts = [f"document {i}\n" * (1 + i % 7) for i in range(200)]
    for i, text in enumerate([*texts, *texts[:50]]):
        (tmp_path / f"{i:03d}.txt").write_text(text)
    once = Corpus(tmp_path, dedup="exact", fraction=0.1)
    assert [d.text for d in once] == texts
    assert once.documents == 200
    train, valid = ({d.text for d in once.split(name)} for name in ("train", "valid"))
    assert valid
    assert not train & valid
    assert once.hash != Corpus(tmp_path, fraction=0.1).hash
    with pytest.raises(ValueError, match="dedup='twice': choose from none, exact, near"):
        duplicates(["a"], "twice")


def test_near_copies_are_those_of_the_jaccard_index():
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(12):
        words = [f"w{n}" for n in rng.integers(0, 5000, 200)]
        changed, other = list(words), list(words)
        changed[100] = "changed"  # 5 of 196 runs of five words
        for at in range(0, 200, 5):
            other[at] = "other"  # nearly all runs
        texts += [" ".join(words), " ".join(other), " ".join(changed).upper()]
    texts += ["", "...", "...!", "short"]

    def jaccard(a, b):
        return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))

    wanted = set()
    for i, text in enumerate(texts):
        if shingles(text) != {""} and any(jaccard(text, texts[j]) >= 0.8 for j in range(i) if j not in wanted):
            wanted.add(i)
    assert wanted == set(range(2, 36, 3))
    assert duplicates(texts, "near") == wanted
    with pytest.raises(ValueError, match=r"dedup_threshold=1\.5 must be above 0 and at most 1"):
        duplicates(texts, "near", 1.5)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ImportError, match=r"pip install 'garrulax\[dedup\]'"):
        duplicates(["a"], "near")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"pip install 'garrulax\[fsspec\]'"):
        list(Corpus("memory://nothing"))


def test_texts_in_an_object_store(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    files = {"a.txt": b"one\n", "sub/b.jsonl": b'{"text": "two"}\n{"prompt": "p", "completion": "c"}\n',
             "sub/c.txt.gz": gzip.compress(b"three"), ".hidden/d.txt": b"no"}  # fmt: skip
    store = fsspec.filesystem("memory")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        store.pipe(f"/bucket/{name}", content)
    there, here = Corpus("memory://bucket"), Corpus(tmp_path)
    assert [(d.text, d.prompt) for d in there] == [(d.text, d.prompt) for d in here]
    assert [d.text for d in there] == ["one\n", "two", "c", "three"]
    assert there.hash == here.hash
    assert [d.text for d in Corpus(["memory://bucket/**/*.gz", "memory://bucket/a.txt"])] == ["three", "one\n"]
    assert next(iter(Corpus("memory://bucket/sub/b.jsonl"))).name == "memory://bucket/sub/b.jsonl:1"
    with pytest.raises(FileNotFoundError, match="no text at memory://bucket/none"):
        list(Corpus("memory://bucket/none"))
    with pytest.raises(ValueError, match="nosuch://x"):
        list(Corpus("nosuch://x"))
