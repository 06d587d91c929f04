"""Corpora: what is read, in which order, what is held out, and how bad input is refused."""

import gzip
import json
import lzma
import sysconfig
from pathlib import Path

import pytest

from garrulax.train import reading as module
from garrulax.train.corpus import Corpora, Corpus, xz_bits_per_byte
from garrulax.train.sources import split_sources


def write(folder, texts):
    """Files 000.txt, 001.txt, ... with these texts."""
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def many(count=200):
    return [f"document {i}\n" * (1 + i % 7) for i in range(count)]


def split(corpus, name):
    return [document.text for document in corpus.split(name)]


def test_every_kind_of_source_in_order(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("b\r\n")
    (tmp_path / "a.py").write_text("a é\n")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "c1", "id": 1}\n\n{"text": "c2\\n"}\n{"text": ""}\n')
    (tmp_path / "sub" / "d.txt.gz").write_bytes(gzip.compress(b"d"))
    (tmp_path / "sub" / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "e"}'))
    (tmp_path / "sub" / "empty.txt").write_text("")
    (tmp_path / "sub" / ".git" / "hidden").write_bytes(b"\0")
    texts = ["a é\n", "b\r\n", "c1", "c2\n", "d", "e"]
    whole = Corpus(tmp_path)
    assert [d.text for d in whole] == texts
    assert [d.text for d in whole] == texts, "a corpus can be read again"
    names = [Path(d.name).relative_to(tmp_path).as_posix() for d in whole]
    assert names == ["a.py", "b.txt", "sub/c.jsonl:1", "sub/c.jsonl:3", "sub/d.txt.gz", "sub/e.jsonl.gz:1"]
    assert (whole.documents, whole.bytes) == (6, len("".join(texts).encode()))
    pattern = Corpus([tmp_path / "b.txt", f"{tmp_path}/**/*.jsonl"])
    assert [d.text for d in pattern] == ["b\r\n", "c1", "c2\n"]


def test_hash_follows_the_content_alone(tmp_path):
    first = write(tmp_path / "one", many())
    other = write(tmp_path / "two", many())
    jsonl = tmp_path / "three.jsonl"
    jsonl.write_text("".join(json.dumps({"text": t}) + "\n" for t in many()))
    assert Corpus(first).hash == Corpus(str(other)).hash == Corpus(jsonl).hash
    (other / "100.txt").write_text("changed")
    assert Corpus(first).hash != Corpus(other).hash
    assert Corpus(first).hash != Corpus(first, fraction=0.1).hash
    assert Corpus(first, valid=other).hash != Corpus(first).hash


def test_copies_do_not_take_all_of_the_text(tmp_path):
    corpus = Corpus(write(tmp_path / "all", ["the same text\n" * 20] * 100))
    train, valid = split(corpus, "train"), split(corpus, "valid")
    assert len(train) == len(valid) == 100  # the tails of all of them
    assert len("".join(valid)) < 0.2 * corpus.bytes


def test_documents_are_held_out_by_their_hash(tmp_path):
    corpus = Corpus(write(tmp_path / "all", many(2000)))
    train, valid = split(corpus, "train"), split(corpus, "valid")
    assert sorted(train + valid) == sorted(many(2000))
    assert set(train).isdisjoint(valid)
    assert 0.035 <= len("".join(valid).encode()) / corpus.bytes < 0.037
    half = Corpus(write(tmp_path / "some", many(2000)[:1000]))
    kept = set(split(half, "valid")) & set(valid)
    assert len(kept) > 0.6 * len(split(half, "valid")), "most of what was held out stays so when the corpus grows"


def test_equal_documents_are_on_the_same_side(tmp_path):
    corpus = Corpus(write(tmp_path / "twice", many(100) * 2))
    assert set(split(corpus, "train")).isdisjoint(split(corpus, "valid"))


def test_a_huge_document_is_never_held_out(tmp_path):
    for i in range(8):
        texts = [*many(100), f"{i}\n" + "huge\n" * 1000]
        corpus = Corpus(write(tmp_path / "huge", texts))
        assert texts[-1] in split(corpus, "train")
        assert split(corpus, "valid")


@pytest.mark.parametrize("texts", [["line\n" * 100], ["line\n" * 100, "row\n" * 100], ["same\n" * 20] * 3, ["x" * 100]])
def test_few_documents_give_their_tails(tmp_path, texts):
    corpus = Corpus(write(tmp_path / "few", texts))
    train, valid = split(corpus, "train"), split(corpus, "valid")
    assert [a + b for a, b in zip(train, valid, strict=True)] == texts
    assert all(text.startswith(("line", "row", "same", "x")) for text in valid), "cut at line ends"
    assert 0.1 <= len("".join(valid)) / len("".join(texts)) <= 0.15


def test_held_out_text_of_its_own(tmp_path):
    folder, valid = write(tmp_path / "train", ["a\n", "b\n"]), write(tmp_path / "valid", ["c\n"])
    corpus = Corpus(folder, valid=valid)
    assert split(corpus, "train") == ["a\n", "b\n"]
    assert split(corpus, "valid") == ["c\n"]
    assert (corpus.documents, corpus.bytes) == (3, 6)
    assert split(Corpora([corpus, Corpus(folder, valid=valid)]), "valid") == ["c\n"], "common to both"


def test_long_files_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST", 64)
    text = "".join(f"line {i} é\n" for i in range(100))
    (tmp_path / "long.txt").write_text(text)
    documents = list(Corpus(tmp_path))
    assert "".join(d.text for d in documents) == text
    assert len(documents) > 10
    assert all(d.text.endswith("\n") and len(d.text.encode()) < 64 + 16 for d in documents)
    assert len({d.name for d in documents}) == len(documents)


def test_the_standard_library():
    corpus = Corpus()
    names = [d.name for d in corpus]
    assert names == [d.name for d in Corpus("stdlib")]
    assert "ast.py" in names
    assert "asyncio/tasks.py" in names
    assert not any(part in ("test", "tests", "site-packages", "idle_test") for n in names for part in n.split("/"))
    assert 8e6 < corpus.bytes < 20e6
    valid = sum(len(text.encode()) for text in split(corpus, "valid"))
    assert 0.034 < valid / corpus.bytes < 0.07
    root = Path(sysconfig.get_paths()["stdlib"])
    assert next(d.text for d in corpus if d.name == "ast.py").encode() == (root / "ast.py").read_bytes()
    assert 1 < xz_bits_per_byte(split(corpus, "valid")) < 2.2


def test_xz_bits_per_byte():
    text = "some text that repeats itself\n" * 300
    packed = lzma.compress(text.encode(), preset=9)
    assert xz_bits_per_byte([text[:100], text[100:]]) == 8 * len(packed) / len(text)
    assert xz_bits_per_byte([text], limit=50) == 8 * len(lzma.compress(text[:50].encode(), preset=9)) / 50
    with pytest.raises(ValueError, match="no text"):
        xz_bits_per_byte([])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            b"text\0",
            r"a\.txt is a binary file \(NUL at byte 4\): only UTF-8 text can be trained on; leave it out",
        ),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 \(byte 3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl:2 has no string field `text`"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl:1 has no string field `text`"),
        ("a.jsonl", b"[]\n", r"a\.jsonl:1 has no string field `text`"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl:2 is not valid JSON"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz is not a complete gzip file"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-9], r"a\.txt\.gz is not a complete gzip file"),
        ("a.txt", b"", r"the corpus is empty: no text in"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Corpus(tmp_path).hash  # noqa: B018
    assert "\n" not in str(error.value)


def test_bad_sources(tmp_path):
    for source in (tmp_path / "nowhere", f"{tmp_path}/*.txt"):
        with pytest.raises(FileNotFoundError, match=r"no text at .*: no such file or folder, and no file matches"):
            list(Corpus(source))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no text at notes, 2024\.txt: no .* \(a comma separates names, unless"
    ):
        list(Corpus([tmp_path / "empty", *split_sources("notes, 2024.txt")]))
    with pytest.raises(ValueError, match="the corpus is empty: it names no file or folder"):
        Corpus([]).hash  # noqa: B018
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(ValueError, match="the held-out text is empty"):
        Corpus(tmp_path / "a.txt", valid=tmp_path / "none.txt").hash  # noqa: B018
    with pytest.raises(ValueError, match=r"between 0 and 0\.2"):
        Corpus(fraction=0.5)
    with pytest.raises(ValueError, match="'train' and 'valid', not 'test'"):
        next(Corpus(tmp_path).split("test"))
