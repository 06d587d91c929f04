"""Texts, settings files and paths as people have them: huge lines, byte order marks, commas, `~`."""

import gzip
import json
import os
import resource

import pytest

from garrulax.cli import starting
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.train import reading as module
from garrulax.train import settings
from garrulax.train.corpus import Corpus
from garrulax.train.shards import build_shards
from garrulax.train.sources import absolute_source, split_sources

BOM = b"\xef\xbb\xbf"


def texts(path):
    return [document.text for document in Corpus(path)]


@pytest.mark.parametrize("compressed", [False, True])
def test_one_huge_line_is_cut_between_characters(tmp_path, monkeypatch, compressed):
    monkeypatch.setattr(module, "_LONGEST", 1000)
    monkeypatch.setattr(module, "_LONGEST_LINE", 10)
    for character in ("é", "中", "🦜", "x"):
        text = character * 5000 + "ab"
        name = tmp_path / ("line.txt.gz" if compressed else "line.txt")
        (gzip.open if compressed else open)(name, "wb").write(text.encode())
        found = texts(name)
        assert "".join(found) == text
        assert max(len(t.encode()) for t in found) <= 1010
    name.write_bytes(gzip.compress(b"\xc3" * 5000) if compressed else b"\xc3" * 5000)
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 0\)"):
        texts(name)


def test_memory_for_a_huge_line_is_bounded(tmp_path):
    with open(tmp_path / "line.txt", "wb") as file:
        for _ in range(20):
            file.write(b"word " * 2_000_000)  # 200 MB without a line break
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = [len(document.text) for document in Corpus(tmp_path / "line.txt")]
    assert sum(sizes) == 200_000_000
    assert max(sizes) <= 2**26 + 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; 411 MB when read whole


def test_a_huge_line_of_jsonl_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_RECORD", 2**20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fits"}) + "\n" + json.dumps({"text": "x" * 2**20}))
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is longer than 1 MiB: cut its text"):
        texts(tmp_path / "a.jsonl")


def test_byte_order_marks_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + b"hello\r\n")
    (tmp_path / "b.jsonl").write_bytes(BOM + b'{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(BOM + b"packed"))
    (tmp_path / "d.txt").write_bytes(BOM)
    (tmp_path / "e.txt").write_bytes(b"in\xef\xbb\xbfside")
    assert texts(tmp_path) == ["hello\r\n", "one", "two", "packed", "in\ufeffside"]
    (tmp_path / "d.txt").write_bytes(BOM + b"a\xff")
    with pytest.raises(ValueError, match=r"d\.txt is not UTF-8 \(byte 4\)"):
        texts(tmp_path)


def test_settings_files_are_utf8_whatever_the_locale(tmp_path, monkeypatch):
    file = tmp_path / "s.toml"
    file.write_bytes(BOM + 'corpus = ["é, 中.txt"]\r\nsteps = 7\r\n[model]\r\nlayers = 2\r\n'.encode())
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    s, config = settings.read_settings(file)
    assert (s.corpus, s.steps, config.layers) == (("é, 中.txt",), 7, 2)
    file.write_bytes("steps = 7 # é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"s\.toml is not UTF-8 \(byte 12\)"):
        settings.read_settings(file)


def test_paths_with_commas_spaces_patterns_and_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("notes, 2024.txt", "a,b/c, d.txt", "x[1].txt", "home/h.txt", "one.txt", "two.txt", "in, two/~t.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for written, want in {
        "notes, 2024.txt": ["notes, 2024.txt"],
        "one.txt,two.txt": ["one.txt", "two.txt"],
        "one.txt, two.txt": ["one.txt", "two.txt"],
        "one.txt,notes, 2024.txt,two.txt": ["one.txt", "notes, 2024.txt", "two.txt"],
        "a,b/": ["a,b/"],
        "a,b/c*.txt,one.txt": ["a,b/c*.txt", "one.txt"],
        "~/h.txt,x[1].txt": ["~/h.txt", "x[1].txt"],
        "none,nothing": ["none", "nothing"],
        "stdlib,": ["stdlib"],
    }.items():
        assert split_sources(written) == want, written
        if "none" not in written and "stdlib" not in written:
            sources = settings.absolute_paths(settings.Settings(corpus=tuple(want))).corpus
            assert all(os.path.isabs(source) for source in sources)
            monkeypatch.chdir("/")
            assert len(texts(sources)) == len(want), written
            monkeypatch.chdir(tmp_path)
    assert texts("~/h.txt") == ["home/h.txt"]
    assert absolute_source("stdlib") == "stdlib"
    monkeypatch.chdir(tmp_path / "in, two")
    assert texts("~t.txt") == texts(absolute_source("~t.txt")) == ["in, two/~t.txt"]
    (tmp_path / "w[1]").mkdir()
    (tmp_path / "w[1]" / "p.txt").write_text("p")
    monkeypatch.chdir(tmp_path / "w[1]")
    assert texts(absolute_source("*.txt")) == ["p"]
    assert starting.settings_words(["gpt2-tiny", "steps=3", "model.rope.theta=2", "/a=b/c", "./x=y"]) == [
        "preset=gpt2-tiny", "steps=3", "model.rope.theta=2", "preset=/a=b/c", "preset=./x=y"]  # fmt: skip


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text\n" * 100)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"token ids cannot be written to .*shards: .*; set GARRULAX_CACHE to another"):
        build_shards(Corpus(tmp_path / "a.txt"), ByteTokenizer())
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="no text at"):
        build_shards(Corpus(tmp_path / "none.txt"), ByteTokenizer())


def test_the_default_rates_follow_the_optimizer_on_the_command_line():
    assert settings.read_settings(None, ["optimizer=adamw"])[0].lr == 1e-3
    assert settings.read_settings(None, ["optimizer=adamw", "lr=5"])[0].lr == 5
    assert settings.read_settings(None, [])[0].lr == 0.02
