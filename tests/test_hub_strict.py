"""What is refused, and that it is refused from headers and config.json alone."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from oracle import config, params
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_hub import assert_same_bytes, folder_of, hf_config

import garrulax as gx
from garrulax.cli import main
from garrulax.hub import reading
from garrulax.hub.tensors import BITS, DTYPES, open_tensors, write_tensors
from garrulax.hub.tokenizers import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def _nothing_is_allocated(monkeypatch, request):
    if "allocates" not in request.keywords:
        monkeypatch.setattr(reading, "_parameter", lambda *_: pytest.fail("allocated"))


@pytest.fixture
def folder(tmp_path):
    return folder_of("llama_gqa", tmp_path / "m")


def with_header(path, header, data=b"\0" * 24):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 12), "b": entry(8, 24)}, "tensor 'b' overlaps with another tensor"),
        ({"a": entry(0, 24), "b": entry(0, 24)}, "tensor 'b' overlaps with another tensor"),
        ({"a": entry(0, 8), "b": entry(12, 24)}, "tensor 'b' comes after a gap"),
        ({"a": entry(4, 24)}, "tensor 'a' comes after a gap"),
        ({"a": entry(0, 20)}, r"its tensors end at byte .*, the file at .* \(is it half a download"),
        ({"a": entry(0, 28)}, r"its tensors end at byte .*, the file at"),
        ({"a": entry(0, 2**40)}, "tensor 'a' ends at byte 1,099,511,627,776 of a file of"),
        ({"a": entry(0, 24, [5])}, r"tensor 'a' has 24 bytes, which is not F32 \(5,\)"),
        ({"a": entry(0, 24, [6], "BF16")}, r"has 24 bytes, which is not BF16 \(6,\)"),
        ({"a": entry(0, 24, [10**12, 10**12])}, "has 24 bytes, which is not F32"),
        ({"a": entry(0, 24, [2**62, 2**62, 2**62, 2**62])}, "has 24 bytes, which is not F32"),
        ({"a": entry(0, 24, [-2, -3])}, "has a shape that is not a list of whole numbers"),
        ({"a": entry(0, 24, [6.0])}, "has a shape that is not a list of whole numbers"),
        ({"a": entry(0, 24, [True])}, "has a shape that is not a list of whole numbers"),
        ({"a": entry(0, 24, [6, *[1] * 40])}, "has more dimensions than 32"),
        ({"a": {**entry(0, 24), "data_offsets": [0, 12, 24]}}, "has more dimensions than 32, or not two offsets"),
        ({"a": {**entry(0, 24), "data_offsets": [24, 0]}}, "has -24 bytes, which is not F32"),
        ({"a": {**entry(0, 24), "data_offsets": "024"}}, "has a data_offsets that is not a list"),
        ({"a": entry(0, 24, dtype="F33")}, "tensor 'a' has the unknown dtype 'F33'"),
        ({"a": entry(0, 24, dtype=["F32"])}, "has the unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [6]}}, "tensor 'a' should have dtype, shape and data_offsets"),
        ({"a": {**entry(0, 24), "more": 1}}, "tensor 'a' should have dtype, shape and data_offsets"),
        ({"a": 5}, "tensor 'a' should have dtype, shape and data_offsets"),
        ({"a\nb": entry(0, 24)}, r"tensor 'a\\nb' has an invalid name"),
        ({"a" * 999: entry(0, 24)}, "has an invalid name"),
        ([], "is not a JSON object"),
        (b'{"a": ' + json.dumps(entry(0, 24)).encode() + b', "a": ' + json.dumps(entry(0, 24)).encode() + b"}",
         "key 'a' appears twice"),
        (b' {"a": ' + json.dumps(entry(0, 24)).encode() + b"}", "does not start with a brace"),
        (b'{"a": \xff}', "is not valid JSON: 'utf-8' codec"),
        (b'{"a": ', "is not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "is nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not valid JSON: Exceeds the limit"),
    ],
)  # fmt: skip
def test_headers_that_lie(header, message, folder):
    with_header(folder / "model.safetensors", header)
    with pytest.raises(ValueError, match=rf"model\.safetensors is damaged.*{message}") as caught:
        gx.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 25, 2**31, 2**63, 2**64 - 1])
def test_header_lengths_that_lie(length, folder):
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * 22)
    with pytest.raises(ValueError, match=f"a file of 32 bytes cannot have a header of {length:,}"):
        gx.load(folder)


@pytest.mark.parametrize("size", range(8))
def test_files_that_are_next_to_empty(size, folder):
    (folder / "model.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match=f"a file of {size} bytes cannot have a header"):
        gx.load(folder)


@pytest.mark.allocates
def test_the_format_is_the_library_s(tmp_path):
    """What we write, it reads; what it writes, we read: every dtype, empty tensors, scalars, metadata."""
    rng = np.random.default_rng(0)
    ours = {f"{kind.__name__}.{i}": rng.standard_normal(shape).astype(kind) for kind in DTYPES.values()
            for i, shape in enumerate([(), (0, 3), (7,), (3, 5), (2, 3, 4)])}  # fmt: skip
    write_tensors(tmp_path / "ours.safetensors", {k: (v.dtype, v.shape) for k, v in ours.items()}, ours.values())
    with safe_open(tmp_path / "ours.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name, x in ours.items():
            np.testing.assert_array_equal(file.get_tensor(name), x)
    others = {kind: np.zeros((3, 2), kind) for kind in ("bool", "uint8", "int8", "int16", "uint32", "int64", "uint64")}
    small = {kind: np.zeros(4, kind) for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}
    (tmp_path / "m").mkdir()
    save_file(ours | others | {str(np.dtype(k)): v for k, v in small.items()}, tmp_path / "m/model.safetensors",
              metadata={"any": "thing"})  # fmt: skip
    found = open_tensors(tmp_path / "m")
    for name, x in (ours | others).items():
        assert found[name].shape == x.shape
        assert BITS[found[name].dtype] == 8 * x.itemsize
    with pytest.raises(ValueError, match=r"stored as float64, float32, float16, bfloat16, .*, not as bool"):
        write_tensors(tmp_path / "x", {"a": (np.dtype("bool"), (3,))}, [])


@pytest.fixture
def sharded(folder):
    gx.save(gx.Model(config("llama_gqa"), params("llama_gqa")), folder, max_shard_size=30_000)
    return folder


def change_index(folder, **changes):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../m/other", "/etc/passwd", "sub/x", "..", ".", "", "a\0b", "a\nb"])
def test_an_index_names_files_of_its_folder(file, sharded):
    change_index(sharded, **{"model.norm.weight": file})
    with pytest.raises(ValueError, match="which is not a file of this folder") as caught:
        gx.load(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.allocates
def test_the_headers_are_the_truth_where_an_index_contradicts_them(sharded):
    """A stale index does no harm unless a tensor is missing; then the message says what it claims."""
    path = sharded / "model.safetensors.index.json"
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    index = json.loads(path.read_text())["weight_map"]
    name, file = next(iter(index.items()))
    wrong = {"dropped": files[0], "elsewhere": "nowhere.safetensors", name: next(f for f in files if f != file)}
    path.write_text(json.dumps({"weight_map": index | wrong}))
    assert_same_bytes(gx.load(sharded).params, params("llama_gqa"))

    path.write_text(json.dumps({"weight_map": index | {name: "nowhere.safetensors"}}))
    stored = load_file(sharded / file)
    last = "model.layers.1.mlp.down_proj.weight"
    save_file({k: v for k, v in stored.items() if k != name}, sharded / file)
    with pytest.raises(FileNotFoundError, match=r"lacks nowhere\.safetensors, one of the \d+ files that model"):
        gx.load(sharded)
    save_file(stored, sharded / file)
    stored = load_file(sharded / index[last])
    save_file({k: v for k, v in stored.items() if k != last}, sharded / index[last])
    path.write_text(json.dumps({"weight_map": index}))
    with pytest.raises(
        ValueError, match=rf"1 missing \({last}\); .* places {last} in {index[last]}, which does not hold"
    ):
        gx.load(sharded)
    for broken in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 5}}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="damaged: it has no weight_map"):
            gx.load(sharded)


@pytest.mark.allocates
def test_links(folder, tmp_path):
    """Weights are read through links, wherever they lead. (`convert` copies nothing from outside of a folder.)"""
    file = folder / "model.safetensors"
    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes(file.read_bytes())
    inside = folder / "data.bin"
    file.rename(inside)
    file.symlink_to("data.bin")
    assert_same_bytes(gx.load(folder).params, params("llama_gqa"))
    file.unlink()
    file.symlink_to(outside)
    assert_same_bytes(gx.load(folder).params, params("llama_gqa"))
    file.unlink()

    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    outside.rename(blobs / "abc")
    (folder / "config.json").rename(blobs / "def")
    (snapshot / "config.json").symlink_to("../../blobs/def")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert_same_bytes(gx.load(snapshot).params, params("llama_gqa"))
    (tmp_path / "disk").mkdir()
    blobs = blobs.rename(tmp_path / "disk" / "blobs")
    (tmp_path / "models--org--name" / "blobs").symlink_to(blobs)  # a cache that was moved to another disk
    assert_same_bytes(gx.load(snapshot).params, params("llama_gqa"))
    (tmp_path / "alias").symlink_to(snapshot)  # the folder itself may be reached by a link
    assert_same_bytes(gx.load(tmp_path / "alias").params, params("llama_gqa"))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_weights_that_are_no_file(kind, folder):
    file = folder / "model.safetensors"
    file.unlink()
    if kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)  # opening it would wait for ever
    with pytest.raises(ValueError, match=r"model\.safetensors is not a file"):
        gx.load(folder)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "weights.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json",
     "generation_config.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja",
     "additional_chat_templates/a.jinja", "part-2.safetensors"],
)  # fmt: skip
def test_links_to_nothing(name, folder):
    """What a file should say is not skipped: a link says that there should be one."""
    if name != "tokenizer.json":
        ByteTokenizer().save(folder)
    if name == "part-2.safetensors":
        index = {"weight_map": {"a": "model.safetensors", "b": name}}
        (folder / "model.safetensors").rename(folder / "part-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name.endswith((".safetensors", ".index.json")):
        (folder / "model.safetensors").unlink()
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    for target, reason in (("../gone/it", "which is missing: put the file there"), (file.name, "leads back to it")):
        file.symlink_to(target)
        with pytest.raises(FileNotFoundError, match=f"{name} is a link to {target}, .*{reason}") as error:
            gx.load(folder)
        assert "\n" not in str(error.value)
        file.unlink()


def test_a_link_into_the_cache_of_the_hub(folder, tmp_path, capsys):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    with pytest.raises(
        FileNotFoundError, match=r"link to \.\./\.\./blobs/abc, which is missing.*`hf download org/name`"
    ):
        gx.load(snapshot)
    for name in ("m", "m.gguf"):
        (tmp_path / name).symlink_to("gone")
        assert main(["info", str(tmp_path / name)]) == 2
        assert "is a link to gone, which is missing" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["foo", "", "int8", 5, ["float32"], {}])
def test_dtypes_that_are_none(dtype, folder):
    for call in (lambda: gx.load(folder, dtype=dtype), lambda: gx.init(gx.preset("gpt2-tiny"), None, dtype=dtype)):
        with pytest.raises(ValueError, match=r"is no dtype.*: parameters can have float32, bfloat16, float16") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "heads=0 must be a whole number of at least 1"),
        ({"num_hidden_layers": -3}, "layers=-3 must be"),
        ({"num_hidden_layers": 10**12}, "asks for 9,000,000,000,003 tensors, but .* holds 30"),
        ({"vocab_size": 10**12}, r"not \(1000000000000, 32\)"),
        ({"hidden_size": 4 * 10**12, "head_dim": 10**12}, "of a shape that config.json does not give"),
        ({"intermediate_size": 10**300}, "of a shape that config.json does not give"),
        ({"head_dim": None, "hidden_size": 31}, "width 31 is not a multiple of heads"),
        ({"num_key_value_heads": 3}, "is not a multiple of kv_heads 3"),
        ({"rms_norm_eps": 10**400}, "norm_eps=1000.* must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "norm_eps=nan must be"),
        ({"rope_parameters": None, "rope_scaling": 5}, "RoPE settings must be an object, not 5"),
        ({"hidden_size": "many"}, "width='many' must be"),
        ({"model_type": "lama"}, r"model_type 'lama' is not implemented \(the nearest are llama"),
        ({"model_type": "gpt-2"}, r"the nearest are gpt2"),
        ({"model_type": ["llama"] * 10_000}, r"model_type \['llama', .*\.\.\.\] is not implemented"),
        ({"model_type": "x" * 10**6}, r"model_type 'xxx.*\.\.\.x*' is not implemented \(there are"),
        ({"surprise\n": "x"}, r"unknown keys 'surprise\\n'"),
    ],
)
def test_absurd_configurations(changes, message, folder):
    raw = {k: v for k, v in (hf_config("llama_gqa") | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            gx.load(folder)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_config_files_that_are_none(folder):
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is nested too deeply"):
        gx.load(folder)
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: 'utf-8'"):
        gx.load(folder)
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**12)  # a sparse file
    with pytest.raises(ValueError, match=r"has 1,000,000,000,000 bytes; such a file has at most"):
        gx.load(folder)


def test_pickles_of_other_kinds(folder):
    (folder / "model.safetensors").rename(folder / "weights.pt")
    for ending in (".pt", ".pth", ".bin"):
        next(f for f in folder.iterdir() if f.stem == "weights").rename(folder / f"weights{ending}")
        with pytest.raises(FileNotFoundError, match=r"only pickled weights .*AutoModelForCausalLM.*save_pretrained"):
            gx.load(folder)
    (folder / "weights.bin").rename(folder / "consolidated.00.pth")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights.*Meta's own.*convert_llama_weights_to_hf") as e:
        gx.load(folder)
    assert "\n" not in str(e.value)
