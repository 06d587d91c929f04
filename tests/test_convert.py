"""`garrulax convert`, model cards, shard sizes: folders to folders."""

import json
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import CAUSAL, config, params, tensors
from safetensors.numpy import load_file
from test_hub import assert_same_bytes, folder_of

import garrulax as gx
from garrulax import models
from garrulax.cli import main
from garrulax.core import spec
from garrulax.hub import card, streaming, writing
from garrulax.hub.converting import convert_folder
from garrulax.hub.tokenizers import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


#: A case of each family; test_hub reads and writes all of them.
QUICK = (
    "gpt1",
    "gpt2",
    "gptneo",
    "gpt_neox",
    "opt_350m",
    "llama_gqa",
    "baichuan7b",
    "chatglm2",
    "falcon40b",
    "glm_original",
)


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in (*CAUSAL, "glm_original")]
)
def test_a_converted_folder_is_what_load_and_save_would_write(case, tmp_path):
    source = folder_of(case, tmp_path / "source")
    for dtype in (None, "bfloat16"):
        convert_folder(source, tmp_path / "converted", dtype=dtype, max_shard_size=20_000)
        gx.save(gx.load(source, dtype=dtype), tmp_path / "saved", max_shard_size=20_000)
        names = sorted(file.name for file in (tmp_path / "saved").iterdir())
        assert names == sorted(file.name for file in (tmp_path / "converted").iterdir())
        for name in set(names) - {"README.md"}:
            assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes(), name


def test_the_command(tmp_path, capsys):
    source = folder_of("llama_gqa", tmp_path / "source")
    ByteTokenizer().save(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.5}')
    words = ["convert", str(source), str(tmp_path / "out"), "--dtype", "bfloat16", "--max-shard-size", "20kB"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"model in {tmp_path / 'out'}\n"  # no bar: this is no terminal
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params("llama_gqa"))
    assert_same_bytes(gx.load(tmp_path / "out", dtype="stored").params, half)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert main(words) == 0  # an older model is replaced


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source", "source"], "one folder"),
        (["source", "source/new"], "one lies in the other"),
        (["source", "."], "one lies in the other"),
        (["absent", "out"], "there is no folder absent"),
        (["source", "out", "--dtype", "int4"], "'int4' is none of float64, float32, float16, bfloat16"),
        (["source", "out", "--max-shard-size", "big"], "max_shard_size='big' is not a size such as 5GB"),
        (["source", "taken"], "holds more than a model (notes.txt)"),
    ],
)
def test_what_the_command_refuses(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of("llama_gqa", tmp_path / "source")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    assert main(["convert", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["source", "taken"]


def test_dialects(tmp_path):
    """Baichuan's fused W_pack becomes LLaMA's three tensors, and back, without loading."""
    source = folder_of("baichuan7b", tmp_path / "source")
    convert_folder(source, tmp_path / "out", dialect="llama")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    fused = tensors("baichuan7b")["model.layers.0.self_attn.W_pack.weight"]
    parts = [stored[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts), fused)
    assert_same_bytes(gx.load(tmp_path / "out").params, gx.load(source).params)
    convert_folder(tmp_path / "out", tmp_path / "back", dialect="baichuan")
    back = load_file(tmp_path / "back" / "model.safetensors")
    np.testing.assert_array_equal(back["model.layers.0.self_attn.W_pack.weight"], fused)

    with pytest.raises(ValueError, match="dialect 'llama' cannot say positions='alibi'"):
        convert_folder(folder_of("baichuan13b", tmp_path / "alibi"), tmp_path / "no", dialect="llama")
    with pytest.raises(ValueError, match="unknown dialect 'mamba'"):
        convert_folder(source, tmp_path / "no", dialect="mamba")
    with pytest.raises(ValueError, match="dialect='glm4': a glm has only one"):
        convert_folder(folder_of("glm_original", tmp_path / "glm"), tmp_path / "no", dialect="glm4")
    assert not (tmp_path / "no").exists()


def test_what_a_family_has_no_dialect_for_and_links_out_of_the_folder_are_refused(tmp_path):
    source = folder_of("gpt2", tmp_path / "source")
    with pytest.raises(ValueError, match="dialect='gpt3': a gpt2 has only one"):
        convert_folder(source, tmp_path / "out", dialect="gpt3")
    (tmp_path / "secret").write_text("x")
    (source / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"vocab\.txt is a link to .*secret, outside of the folder"):
        convert_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_numbers_that_float16_cannot_hold_are_refused(stored, tmp_path):
    large = {name: np.where(x > 0, 1e6, x).astype(stored) for name, x in tensors("gpt2").items()}
    source = folder_of("gpt2", tmp_path / "source", large)
    with pytest.raises(ValueError, match=r"model\.safetensors holds numbers beyond float16's 65,504"):
        convert_folder(source, tmp_path / "out", dtype="float16")
    with pytest.raises(ValueError, match="choose another dtype"):
        gx.load(source, dtype="float16")
    convert_folder(source, tmp_path / "out", dtype="bfloat16")


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    source = folder_of("gpt2", tmp_path / "source")

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_folder(source, tmp_path / "out", progress=interrupt)
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_the_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["convert", str(folder_of("gpt2", tmp_path / "source")), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    assert "\r\x1b[K[####" in shown
    assert shown.splitlines()[-1].startswith("model in")
    assert "0:00 left" in shown


def test_progress_counts_every_byte_once(tmp_path):
    seen = []
    convert_folder(folder_of("llama_gqa", tmp_path / "m"), tmp_path / "o", progress=lambda *a: seen.append(a))
    size = sum(x.nbytes for x in tensors("llama_gqa").values())
    assert {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == size
    assert len(seen) == len(tensors("llama_gqa"))


def test_memory_holds_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "THREADS", 2)
    monkeypatch.setattr(streaming, "BLOCK", 1 << 16)
    monkeypatch.setattr(streaming, "STRAIGHT", 1 << 16)
    c = gx.preset("llama-tiny", width=256, mlp_width=1024, layers=12, vocab=2048)
    zeros = spec.map_specs(lambda s: np.zeros(s.shape, np.float32), models.llama.parameters(c))
    gx.save(gx.Model(c, zeros), tmp_path / "m")
    convert_folder(tmp_path / "m", tmp_path / "o")
    tracemalloc.start()
    convert_folder(tmp_path / "m", tmp_path / "o", dtype="bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * 2048 * 256 * 4 < gx.count(c) * 2 / 8


# -- Sizes and cards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1.5 gb", 15 * 10**8), ("2GiB", 2**31), ("10k", 10**4), (7, 7),
     ("123", 123), ("64 B", 64)],
)  # fmt: skip
def test_sizes(size, expected):
    assert writing.parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "-5GB", "5 parsecs", "0", 0, -1, "1e9", "5iB", None, "٥GB5"])
def test_sizes_that_are_none(size, tmp_path):
    with pytest.raises(ValueError, match="is not a size such as 5GB"):
        gx.save(gx.Model(config("gpt2"), params("gpt2")), tmp_path / "m", max_shard_size=size)
    assert not any(tmp_path.iterdir())


def test_shard_sizes_as_text(tmp_path):
    gx.save(gx.Model(config("gpt2"), params("gpt2")), tmp_path / "m", max_shard_size="30 kB")
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert all(sum(x.nbytes for x in load_file(f).values()) <= 30_000 for f in files)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert {f.name for f in files} == set(index["weight_map"].values())


def test_a_card_claims_what_is_known_and_stays_once_edited(tmp_path):
    model, path = gx.Model(config("gpt2"), params("gpt2")), tmp_path / "m" / "README.md"
    gx.save(model, tmp_path / "m")
    text = path.read_text()
    assert text.startswith("---\nlicense: unknown\n")
    assert f"{gx.count(model.config):,} parameters in float32" in text
    assert "gpt family (model_type `gpt2`)" in text
    assert card.is_unedited_stub(path)
    gx.save(gx.Model(config("llama_gqa"), params("llama_gqa")), tmp_path / "m")
    assert "llama family" in path.read_text()  # a stub follows the model
    mine = path.read_text().replace("license: unknown", "license: mit")
    path.write_text(mine)
    assert not card.is_unedited_stub(path)
    gx.save(model, tmp_path / "m")
    assert path.read_text() == mine
    assert gx.load(tmp_path / "m").config == model.config
    path.write_bytes(b"\xff not text")
    convert_folder(folder_of("gpt2", tmp_path / "other"), tmp_path / "m")
    assert path.read_bytes() == b"\xff not text"


# -- garrulax info ----------------------------------------------------------------------------------------------------


def test_info_of_folders(tmp_path, capsys):
    folder = folder_of("llama_gqa", tmp_path / "m", {
        k: v.astype(ml_dtypes.bfloat16) if "mlp" in k else v for k, v in tensors("llama_gqa").items()
    })  # fmt: skip

    def info():
        assert main(["info", str(folder)]) == 0
        return capsys.readouterr().out

    shown = info()
    assert "llama family" in shown
    assert "files  model.safetensors" in shown
    assert "BF16   9 tensors" in shown
    assert "F32    21 tensors" in shown
    assert "all that config.json asks for is there" in shown
    numbers = sum(int(np.prod(x.shape)) for x in tensors("llama_gqa").values())
    assert f"{numbers:,} parameters" in shown
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    assert "misfit" in info()
    (folder / "model.safetensors").write_bytes(b"broken")
    assert "none  " in info()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pickled weights" in info()
