"""Hugging Face folders in and out: bytes, names, shards, meshes, and what is refused."""

import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
import tracemalloc
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from oracle import CAUSAL, arrays, config, params, raw_config, relative_error, tensors, weights
from safetensors.numpy import load_file, save_file

import garrulax as gx
from garrulax import models
from garrulax.core import sharding, spec
from garrulax.core.layout import TensorLayout
from garrulax.core.strategies import STRATEGIES
from garrulax.hub import reading, replacing, streaming, writing
from garrulax.hub.streaming import read_windows, window
from garrulax.hub.tensors import StoredTensor, open_tensors

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = (*CAUSAL, "glm_original")


def hf_config(case):
    return models.family(config(case)).to_hf(config(case)) if case == "glm_original" else raw_config(case)["config"]


def folder_of(case, path, stored=None, **changes):
    """A Hugging Face folder of a reference case; `stored`: other tensors than the case's; `changes`: to config.json."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf_config(case) | changes))
    if stored is None:
        shutil.copy(weights(case), path / "model.safetensors")
    else:
        save_file(stored, path / "model.safetensors")
    return path


def assert_same_bytes(a, b):
    a, b = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        assert (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, np.asarray(y).tobytes()), path


@pytest.mark.parametrize("case", CASES)
def test_import_export_import_keeps_every_byte(case, tmp_path):
    model = gx.load(folder_of(case, tmp_path / "reference"))
    assert model.config == config(case)
    assert model.tokenizer is None
    assert_same_bytes(model.params, params(case))
    gx.save(model, tmp_path / "ours")
    again = gx.load(str(tmp_path / "ours"))
    assert again.config == model.config
    assert_same_bytes(again.params, model.params)
    names = models.family(model.config).tensor_names(model.config)
    left_out = (*(names.heads if model.config.tied else ()), *names.buffers)
    expected = {k: v for k, v in tensors(case).items() if not (left_out and k.endswith(left_out))}
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(written[k].tobytes() == expected[k].tobytes() for k in expected)


def test_loaded_models_give_the_reference_logits(tmp_path):
    model = gx.load(folder_of("llama3", tmp_path / "m"))
    logits, _ = gx.forward(model.params, jnp.asarray(arrays("llama3")["input_ids"]), model.config)
    assert relative_error(logits, arrays("llama3")["logits"]) <= 2e-6


@pytest.mark.parametrize("case", ["gpt2", "llama_gqa", "baichuan7b", "glm_original"])
def test_every_form_of_the_parameters_writes_the_same_files(case, tmp_path):
    """Stacked, unstacked, sharded over eight devices, twice: the same bytes."""
    model = gx.load(folder_of(case, tmp_path / "reference"))
    sharded = gx.load(tmp_path / "reference", mesh=gx.make_mesh("fsdp=4,tensor=2"))
    forms = [model, model, model.replace(params=gx.unstack(model.params)), sharded]
    for i, form in enumerate(forms):
        gx.save(form, tmp_path / str(i))
    files = sorted(file.name for file in (tmp_path / "0").iterdir())
    assert files == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    for name in files:
        assert len({(tmp_path / str(i) / name).read_bytes() for i in range(len(forms))}) == 1


def test_generation_config_and_dtype(tmp_path):
    c = dataclasses.replace(config("llama_gqa"), eos=(2, 5), bos=None)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params("llama_gqa"))
    gx.save(gx.Model(c, half), tmp_path / "m")
    assert json.loads((tmp_path / "m/generation_config.json").read_text()) == {"eos_token_id": [2, 5]}
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "bfloat16"
    model = gx.load(tmp_path / "m", dtype="stored")
    assert model.config == c
    assert_same_bytes(model.params, half)
    assert_same_bytes(
        gx.load(tmp_path / "m", dtype="float32").params, jax.tree.map(lambda x: x.astype(jnp.float32), half)
    )


def test_shards_and_index(tmp_path):
    model = gx.load(folder_of("gpt2", tmp_path / "reference"))
    gx.save(model, tmp_path / "m", max_shard_size=30_000)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    stored = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == 4 * gx.count(model.config)
    sizes = [[x.nbytes for x in load_file(file).values()] for file in files]
    assert all(sum(size) <= 30_000 for size in sizes)
    assert all(sum(size) + later[0] > 30_000 for size, later in itertools.pairwise(sizes))  # no file has room to spare
    assert_same_bytes(gx.load(tmp_path / "m").params, model.params)
    gx.save(model, tmp_path / "m")  # one file again: the shards and the index are gone
    assert sorted(file.suffix for file in (tmp_path / "m").iterdir()) == [".json", ".json", ".md", ".safetensors"]

    gx.save(model, tmp_path / "m", max_shard_size=30_000)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {files[1].name}, one of the {len(files)} files"):
        gx.load(tmp_path / "m")
    index["weight_map"]["transformer.wte.weight"] = "../elsewhere.safetensors"
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'\.\./elsewhere\.safetensors', which is not a file of this folder"):
        gx.load(tmp_path / "m")
    (tmp_path / "m/model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors files but no model\.safetensors\.index\.json"):
        gx.load(tmp_path / "m")


def test_a_tokenizer_goes_along(tmp_path):
    from garrulax.hub.tokenizers import ByteTokenizer

    model = gx.load(folder_of("gpt2", tmp_path / "reference")).replace(tokenizer=ByteTokenizer())
    gx.save(model, tmp_path / "m")
    tokenizer = gx.load(tmp_path / "m").tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("naïve 🙂\n")) == "naïve 🙂\n"
    assert tokenizer.eos == model.tokenizer.eos
    gx.save(gx.load(tmp_path / "m"), tmp_path / "m")  # a folder with tokenizer files is still a model folder


# -- Names ------------------------------------------------------------------------------------------------------------


def test_prefixes_buffers_and_tied_tensors(tmp_path):
    gpt2, glm, llama = tensors("gpt2"), tensors("glm_original"), tensors("llama_tied")
    bare = {k.removeprefix("transformer."): v for k, v in gpt2.items() if k != "lm_head.weight"}
    buffers = {f"h.{i}.attn.{name}": np.zeros((1, 1), np.float32) for i in range(3) for name in ("bias", "masked_bias")}
    assert_same_bytes(gx.load(folder_of("gpt2", tmp_path / "bare", bare | buffers)).params, params("gpt2"))
    gpt1 = {k.removeprefix("transformer."): v for k, v in tensors("gpt1").items() if k != "lm_head.weight"}
    buffers = {"h.0.attn.bias": np.zeros((1, 1), np.float32), "position_ids": np.arange(32)}
    assert_same_bytes(gx.load(folder_of("gpt1", tmp_path / "gpt1", gpt1 | buffers)).params, params("gpt1"))
    buffers = {f"transformer.h.0.attn.attention.{name}": np.zeros(1, np.float32) for name in ("bias", "masked_bias")}
    assert_same_bytes(
        gx.load(folder_of("gptneo", tmp_path / "neo", tensors("gptneo") | buffers)).params, params("gptneo")
    )
    prefixed = {f"glm.{k}": v for k, v in glm.items()}
    assert_same_bytes(gx.load(folder_of("glm_original", tmp_path / "glm", prefixed)).params, params("glm_original"))
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    head = {k: v for k, v in llama.items() if k != "model.embed_tokens.weight"}  # either of the tied two will do
    assert "lm_head.weight" in head
    assert_same_bytes(gx.load(folder_of("llama_tied", tmp_path / "head", head | rotary)).params, params("llama_tied"))


def test_tied_tensors_that_differ_are_refused(tmp_path):
    stored = tensors("gpt2")
    stored["lm_head.weight"] = stored["lm_head.weight"].copy()
    stored["lm_head.weight"][-1, -1] += 1e-6
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to transformer\.wte\.weight, but they differ"):
        gx.load(folder_of("gpt2", tmp_path / "m", stored))
    untied = gx.load(folder_of("gpt2", tmp_path / "m", stored, tie_word_embeddings=False))
    assert untied.params["head"].shape == untied.params["tokens"].shape


def test_every_misfit_is_named_before_anything_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_parameter", lambda *_: pytest.fail("allocated"))
    stored = tensors("llama_gqa")
    for i in range(3):
        del stored[f"model.layers.{i}.mlp.up_proj.weight"], stored[f"model.layers.{i}.mlp.down_proj.weight"]
    stored["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    stored["model.norm.weight"] = np.ones(31, np.float32)
    stored["lm_head.weight"] = np.ones((96, 32), np.int8)
    with pytest.raises(ValueError, match=r"do not fit its config\.json") as caught:
        gx.load(folder_of("llama_gqa", tmp_path / "m", stored))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "6 missing (model.layers.0.mlp.down_proj.weight", "and 2 more)",
        "1 unknown (model.layers.0.self_attn.q_norm.weight)",
        "model.norm.weight is (31,), not (32,)",
        "lm_head.weight is I8",
    ):  # fmt: skip
        assert part in message


def test_two_names_for_one_tensor_are_refused(tmp_path):
    stored = tensors("gpt2")
    stored["ln_f.weight"] = stored["transformer.ln_f.weight"]
    with pytest.raises(ValueError, match=r"1 given twice.*ln_f\.weight"):
        gx.load(folder_of("gpt2", tmp_path / "m", stored))


def test_dtypes_that_cannot_be_kept_are_refused(tmp_path):
    stored = tensors("llama_gqa")
    name = "model.layers.1.input_layernorm.weight"
    folder_of("llama_gqa", tmp_path / "m", stored | {name: stored[name].astype(ml_dtypes.bfloat16)})
    with pytest.raises(ValueError, match=r"input_layernorm\.weight are stored as .*: give a dtype"):
        gx.load(tmp_path / "m", dtype="stored")
    assert gx.load(tmp_path / "m", dtype=jnp.float32).params["norm"]["scale"].dtype == jnp.float32
    folder_of("llama_gqa", tmp_path / "m", {k: v.astype(np.float64) for k, v in stored.items()})
    with pytest.raises(ValueError, match="would be float64, which JAX has only with jax_enable_x64"):
        gx.load(tmp_path / "m")
    with jax.enable_x64(True):
        assert gx.load(tmp_path / "m").params["tokens"].dtype == jnp.float64


# -- Folders ----------------------------------------------------------------------------------------------------------


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        gx.load(tmp_path)
    folder_of("gpt2", tmp_path / "m")
    with pytest.raises(ValueError, match="is a file: give the folder"):
        gx.load(tmp_path / "m" / "config.json")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        gx.load(tmp_path / "absent")
    (tmp_path / "m/config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        gx.load(tmp_path / "m")
    (tmp_path / "m/config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        gx.load(tmp_path / "m")


def test_damaged_and_pickled_weights(tmp_path):
    file = folder_of("gpt2", tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        gx.load(tmp_path / "m")
    file.rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights.*save_pretrained") as caught:
        gx.load(tmp_path / "m")
    assert "\n" not in str(caught.value)
    (tmp_path / "m" / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        gx.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not implemented .*gpt2, .*glm, .*llama"),
        ({"model_type": "glm", "max_position_embeddings": 131072}, "model_type 'glm' is not implemented"),  # GLM-4
        ({"architectures": ["T5Model"]}, r"architectures \['T5Model'\] is not implemented"),
        ({}, "is not implemented"),
    ],
)
def test_families_that_are_not_implemented_are_named(raw, message):
    with pytest.raises(ValueError, match=message):
        reading.family_of(raw)


def test_a_config_without_model_type_is_known_by_its_architecture():
    assert reading.family_of({"architectures": ["GPT2LMHeadModel"]}).Config is models.gpt.Config


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"^there is no folder org/name: .*pip install 'garrulax\[hub\]'"):
        gx.load("org/name")
    with pytest.raises(FileNotFoundError, match="there is no folder /org/name"):
        gx.load("/org/name")

    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        if name == "org/absent":
            raise RuntimeError("401 Client Error.\nand a page of hints")
        return str(folder_of("gpt2", tmp_path / "cache"))

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert_same_bytes(gx.load("org/name").params, params("gpt2"))
    assert asked["name"] == "org/name"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    with pytest.raises(
        FileNotFoundError,
        match=r"^there is no folder org/absent: check the path\. .* 401 Client Error\. .*hf download org/absent",
    ):
        gx.load("org/absent")
    folder_of("llama", tmp_path / "org")
    (tmp_path / "org").rename(tmp_path / "name")
    (tmp_path / "org").mkdir()
    (tmp_path / "name").rename(tmp_path / "org" / "name")
    assert gx.load("org/name").config == config("llama")  # a folder goes before the hub


# -- Placement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameters_are_born_sharded(strategy, tmp_path):
    mesh = gx.make_mesh("data=2,fsdp=2,tensor=2")
    folder = folder_of("llama_gqa", tmp_path / "m")
    model = gx.load(folder, mesh=mesh, strategy=strategy)
    assert_same_bytes(model.params, params("llama_gqa"))
    wanted = sharding.shardings(models.llama.parameters(model.config), mesh, strategy)
    for x, place in zip(jax.tree.leaves(model.params), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)


def test_only_what_the_devices_need_is_read(tmp_path, monkeypatch):
    """With the width over eight devices every number is read once: no device reads the part of another."""
    read, read_rows = [], StoredTensor.read

    def counted(tensor, first, step, rows):
        read_rows(tensor, first, step, rows)
        read.append(rows.array.size // tensor.numpy_dtype.itemsize)

    stored, folder = tensors("llama_gqa"), folder_of("llama_gqa", tmp_path / "m")
    monkeypatch.setattr(StoredTensor, "read", counted)
    everything = sum(x.size for x in stored.values())
    for mesh, strategy in (
        ("fsdp=8", "fsdp+tp"),
        ("data=8", "ddp"),
        ("data=4,fsdp=2", "fsdp"),
        ("data=4,tensor=2", "tp"),
    ):
        read.clear()
        gx.load(folder, mesh=gx.make_mesh(mesh), strategy=strategy)
        assert sum(read) == everything, mesh  # copies for several devices are read once
    place = NamedSharding(gx.make_mesh("fsdp=8"), PartitionSpec(None, "fsdp"))
    index = next(iter(place.addressable_devices_indices_map((96, 32)).values()))
    table = models.llama.parameters(config("llama_gqa"))["tokens"]
    read.clear()
    reading._read_parameter(table, [open_tensors(folder)["model.embed_tokens.weight"]], np.dtype("float32"), index)
    assert sum(read) == 96 * 32 // 8  # one device reads its own part


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tensor=2"])
def test_cpus_take_the_memory_over_and_other_devices_are_filled_layer_by_layer(mesh, tmp_path, monkeypatch):
    """No GPU here: their way, on CPUs, must give the same numbers."""
    folder, mesh = folder_of("glm_original", tmp_path / "m"), mesh and gx.make_mesh(mesh)
    made, empty = {}, streaming.empty

    def recorded(shape, dtype):
        out = empty(shape, dtype)
        made[out.ctypes.data] = out.nbytes
        return out

    monkeypatch.setattr(streaming, "empty", recorded)
    here = gx.load(folder, mesh=mesh).params
    pointers = {s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(here) for s in x.addressable_shards}
    assert pointers == made.keys()
    made.clear()
    monkeypatch.setattr(reading, "_platform", lambda place: "gpu")
    assert_same_bytes(gx.load(folder, mesh=mesh).params, here)
    assert max(made.values()) <= max(x.nbytes for x in tensors("glm_original").values())


def test_memory_beyond_the_model_is_less_than_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 1 << 15)
    monkeypatch.setattr(streaming, "THREADS", 2)
    c = gx.preset("llama-tiny", width=256, mlp_width=1024, layers=4, vocab=2048)
    gx.save(gx.Model(c, spec.map_specs(lambda s: np.ones(s.shape, np.float32), models.llama.parameters(c))), tmp_path)
    gx.load(tmp_path)
    for dtype in (None, "bfloat16"):
        tracemalloc.start()
        params = gx.load(tmp_path, dtype=dtype).params
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak - sum(x.nbytes for x in jax.tree.leaves(params)) < 0.5 * 2048 * 256 * 4


@st.composite
def windows(draw):
    """A split of a stored tensor, what is taken of it, an order, the stored shape, and a window of the parameter."""
    split = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    ends = sorted({*draw(st.sets(st.integers(1, len(split)))), len(split)})
    starts = [0, *ends[:-1]]
    shape = tuple(int(np.prod(split[a:b])) for a, b in zip(starts, ends, strict=True))

    def part(size):
        start = draw(st.integers(0, size - 1))
        return start, draw(st.integers(start + 1, size))

    take = [draw(st.sampled_from([None, part(size), draw(st.integers(0, size - 1))])) for size in split]
    sizes = [size if t is None else t[1] - t[0] for size, t in zip(split, take, strict=True) if not isinstance(t, int)]
    order = draw(st.permutations(range(len(sizes))))
    window = [slice(*part(sizes[i])) for i in order]
    return split, tuple(take) if draw(st.booleans()) else (), tuple(order), shape, tuple(window)


@settings(max_examples=300, deadline=None)
@given(windows())
def test_reading_a_part_equals_part_of_the_whole(case):
    split, take, order, shape, part = case
    if not take and len(order) != len(split):  # all of a tensor has all of its dimensions
        order, part = tuple(range(len(split))), tuple(slice(0, n) for n in split)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        save_file({"before": np.zeros(3, np.float32), "x": x}, f"{folder}/model.safetensors")
        index = tuple(slice(*t) if isinstance(t, tuple) else slice(None) if t is None else t for t in take)
        index += (slice(None),) * (len(split) - len(index))
        parameter = x.reshape(split)[index].transpose(order)
        layout = TensorLayout("x", "", shape, split, index, order, parameter.shape, 1)
        tensor = open_tensors(Path(folder))["x"]
        np.testing.assert_array_equal(layout.read(x), parameter)
        for at, dtype in (((), np.float32), (part, np.float32), (part, np.float64), (part, ml_dtypes.bfloat16)):
            wanted = parameter[at].astype(dtype)
            target = np.full(wanted.shape, -1, dtype)
            read_windows([window(tensor, layout, target, at)])
            np.testing.assert_array_equal(target, wanted)


def test_a_transposed_tensor_wider_than_a_block_is_read_whole(tmp_path):
    """Its rows are read in several parts: 64 rows of 5000 columns are more than a block holds."""
    x = np.random.default_rng(0).normal(size=(80, 5000)).astype(np.float32)
    save_file({"x": x}, tmp_path / "model.safetensors")
    target = np.zeros(x.T.shape, np.float32)
    layout = TensorLayout("x", "", x.shape, x.shape, (slice(None), slice(None)), (1, 0), x.T.shape, 1)
    read_windows([window(open_tensors(tmp_path)["x"], layout, target)])
    np.testing.assert_array_equal(target, x.T)


# -- Saving -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return gx.Model(config("gpt2"), params("gpt2"))


def test_saving_replaces_a_model_and_nothing_else(model, tmp_path):
    gx.save(model, tmp_path / "deep" / "m")
    gx.save(model, tmp_path / "deep" / "m")
    (tmp_path / "empty").mkdir()
    gx.save(model, tmp_path / "empty")
    assert_same_bytes(gx.load(tmp_path / "empty").params, model.params)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    gx.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()

    (tmp_path / "empty" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds more than a model \(notes\.txt\): choose another folder"):
        gx.save(model, tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no config\.json"):
        gx.save(model, tmp_path / "other")
    with pytest.raises(ValueError, match="is a file"):
        gx.save(model, tmp_path / "other" / "vocab.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "empty", "link", "other"]


@pytest.mark.parametrize("fails", ["write_tensors", "_write_json"])
def test_a_save_that_fails_leaves_the_older_model(fails, model, tmp_path, monkeypatch):
    gx.save(model, tmp_path / "m")
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(writing, fails, full)
    other = model.replace(params=jax.tree.map(lambda x: x + 1, model.params))
    for target in ("m", "new"):
        with pytest.raises(OSError, match="No space left"):
            gx.save(other, tmp_path / target)
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_an_older_model_comes_back_where_the_last_rename_fails(model, tmp_path, monkeypatch):
    gx.save(model, tmp_path / "m")
    rename = type(tmp_path).rename

    def failing(self, target):
        if self.suffix == ".new":
            raise OSError("busy")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    monkeypatch.setattr(replacing, "_exchanged", lambda *names: False)  # as on systems that cannot
    with pytest.raises(OSError, match="busy"):
        gx.save(model.replace(params=jax.tree.map(lambda x: x + 1, model.params)), tmp_path / "m")
    assert_same_bytes(gx.load(tmp_path / "m").params, model.params)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_parameters_of_another_config_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"positions should be \(33, 32\), is"):
        gx.save(model.replace(config=dataclasses.replace(model.config, context=33)), tmp_path / "m")
    with pytest.raises(ValueError, match="head missing"):
        gx.save(model.replace(config=dataclasses.replace(model.config, tied=False)), tmp_path / "m")
    deeper = dataclasses.replace(model.config, layers=4)
    for tree in (model.params, gx.unstack(model.params)):
        with pytest.raises(ValueError, match=r"blocks/attention/out should be \(4,"):
            gx.save(model.replace(config=deeper, params=tree), tmp_path / "m")
    assert not any(tmp_path.iterdir())


def test_a_model_prints_without_its_numbers(model):
    assert repr(model) == f"Model(config={model.config!r}, tokenizer=None)"
