"""Quantised checkpoints: every format against its owner's numbers, and what is refused."""

import json

import jax
import numpy as np
import pytest
import quantised_cases as cases

import garrulax as gx
from garrulax.core.coded import Coded
from garrulax.core.leaf import weights
from garrulax.core.quantised import Quantised
from garrulax.hub.gguf.blocks import FORMATS
from garrulax.hub.quantised import formats

pytestmark = pytest.mark.usefixtures("quick_compilation")


def assert_close(ours, theirs, case):
    error = np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()
    assert error <= cases.TOLERANCE.get(case, 1e-6)


def numbers(leaf):
    """The only layer of a quantised weight, [outputs, inputs], without compiling."""
    return Coded.of(jax.tree.map(lambda x: np.asarray(x)[0], leaf)).numbers()


@pytest.mark.parametrize("case", cases.FOLDERS)
def test_a_folder_keeps_its_codes_or_becomes_plain(case, tmp_path):
    folder = cases.folder(tmp_path, case)
    theirs = cases.ARRAYS[f"{case}.weight"]
    blocks = gx.load(folder).params["blocks"]
    plain = gx.load(folder, dtype="float32").params["blocks"]
    assert sum(isinstance(w, Quantised) for w in weights(blocks)) == 5
    assert not any(isinstance(w, Quantised) for w in weights(plain))
    for part, name in (("attention", "value"), ("mlp", "up")):
        assert_close(plain[part][name][0].reshape(theirs.shape[::-1]).T, theirs, case)
    leaf = blocks["attention"]["value"]
    assert leaf.shape == plain["attention"]["value"].shape
    np.testing.assert_array_equal(numbers(leaf), np.asarray(plain["attention"]["value"]).reshape(theirs.shape[::-1]).T)


@pytest.mark.parametrize("bits", [4, 8])
def test_chatglm_folders_split_their_fused_matrix(bits, tmp_path):
    """[20, 48] is query (3 heads), key and value (1 each) of width 4, and gate and up."""
    found, theirs = cases.arrays(f"chatglm.int{bits}"), cases.ARRAYS[f"chatglm.int{bits}.weight"]
    own = {"weight": found["weight_i8"], "weight_scale": found["weight_scale"]}
    h, rng = "transformer.encoder.layers.0.", np.random.default_rng(0)

    def plain(*shape):
        return rng.normal(size=shape).astype(np.float16)

    tensors = {
        "transformer.embedding.word_embeddings.weight": plain(11, 48), "transformer.output_layer.weight": plain(11, 48),
        "transformer.encoder.final_layernorm.weight": plain(48), h + "input_layernorm.weight": plain(48),
        h + "post_attention_layernorm.weight": plain(48), h + "self_attention.dense.weight": plain(48, 12),
        h + "mlp.dense_4h_to_h.weight": plain(48, 10), h + "self_attention.query_key_value.bias": plain(20),
    }  # fmt: skip
    for name in ("self_attention.query_key_value", "mlp.dense_h_to_4h"):
        tensors |= {f"{h}{name}.{end}": array for end, array in own.items()}
    config = json.loads((cases.ORACLES / "chatglm2_s0.json").read_text())["config"]
    config |= {
        "quantization_bit": bits, "hidden_size": 48, "num_layers": 1, "num_attention_heads": 3, "kv_channels": 4,
        "multi_query_group_num": 1, "ffn_hidden_size": 10, "padded_vocab_size": 11, "vocab_size": 11,
    }  # fmt: skip
    cases.write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    blocks = gx.load(tmp_path).params["blocks"]
    for part, names in (("attention", ("query", "key", "value")), ("mlp", ("gate", "up"))):
        assert_close(np.concatenate([numbers(blocks[part][name]) for name in names]), theirs, "")
    assert not isinstance(blocks["mlp"]["down"], Quantised)


@pytest.mark.parametrize("name", ["MXFP4", "IQ4_NL"])
def test_gguf_blocks_with_tables(name):
    format = next(f for f in FORMATS.values() if f.name == name)
    raw, theirs = cases.ARRAYS[f"gguf.{name}.data"], cases.ARRAYS[f"gguf.{name}.weight"]
    assert_close(format.decode(raw.reshape(-1, format.bytes)).reshape(theirs.shape), theirs, "")


def test_experts_of_gpt_oss():
    found = formats.mxfp4_experts(cases.ARRAYS["mxfp4.gpt_oss.blocks"], cases.ARRAYS["mxfp4.gpt_oss.scales"])
    np.testing.assert_array_equal([one.numbers() for one in found], cases.ARRAYS["mxfp4.gpt_oss.weight"])


def test_blocks_of_a_narrow_matrix():
    """bitsandbytes' blocks of 64 numbers go over the ends of rows of 40."""
    found = formats.bnb_4bit(cases.parts("bnb.nf4_float32_10x40")[0], "m", {})
    assert_close(found.numbers(), cases.ARRAYS["bnb.nf4_float32_10x40.weight"], "")


UP, V1, FP8 = "model.layers.0.mlp.up_proj.", "gptq_v1.b4_sym_g32", "deepseek_fp8.64x130"


def changed(end, f):
    def change(tensors, config):
        tensors[UP + end] = f(tensors[UP + end])

    return change


def spoilt(array, value):
    array = array.copy()
    array.flat[0] = value
    return array


def removed(end):
    return lambda tensors, config: tensors.pop(UP + end)


def setting(**changes):
    return lambda tensors, config: config["quantization_config"].update(changes)


REFUSED = [
    (V1, removed("qzeros"), "up_proj, which is quantised .GPTQ, 4 bits., lacks qzeros"),
    (V1, removed("scales"), "lacks scales"),
    (V1, changed("qweight", lambda a: a[:-4]), "up_proj.weight is .32, 96., not .32, 128."),
    (V1, changed("scales", lambda a: a[:-1]), "up_proj.qzeros does not fit the codes"),
    (V1, changed("scales", lambda a: spoilt(a, np.nan)), "has a scale that is not finite"),
    (V1, changed("scales", lambda a: spoilt(a, 0)), "has a scale of zero"),
    (V1, changed("g_idx", lambda a: a + 9), "g_idx names groups outside of 0..3"),
    (V1, changed("qzeros", lambda a: spoilt(a, 0)), "qzeros are those of no version"),
    (V1, setting(bits=5), "bits=5 are not implemented .GPTQ: 2, 3, 4 and 8 are"),
    (V1, setting(checkpoint_format="marlin"), "checkpoint_format='marlin'"),
    (V1, setting(quant_method="aqlm"), "the weights are quantised .aqlm"),
    ("awq.gemm_g32", setting(version="gemv"), "version='gemv'"),
    ("ct.int4_sym_g32", setting(format="marlin-24"), "format='marlin-24, 4 bits'"),
    ("ct.fp8_channel", changed("weight", lambda a: (cases.F8, spoilt(a[1], 127))), "up_proj.weight holds NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change", "message"), REFUSED)
def test_bad_folders_are_refused_by_name(case, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gx.load(cases.folder(tmp_path, case, change))


def test_version_2_zero_points_under_the_label_of_version_1(tmp_path, caplog):
    """Symmetric zero points show their version: every weight would be off by a scale."""
    case = "gptq_v2.b4_sym_g32"
    leaf = gx.load(cases.folder(tmp_path, case, setting(checkpoint_format="gptq"))).params["blocks"]["mlp"]["up"]
    np.testing.assert_array_equal(numbers(leaf), cases.ARRAYS[f"{case}.weight"])
    assert "are of the other version" in caplog.text


def test_zero_points_of_0_that_autogptq_packed_are_reported(tmp_path, caplog):
    def change(tensors, config):
        zeros = tensors[UP + "qzeros"].copy()
        zeros.view(np.uint8)[0, :4] = (0x66, 0xF6, 0xFF, 0xFF)  # 7 7 7 0 7 7 7 7, as its packer writes them
        tensors[UP + "qzeros"] = zeros

    gx.load(cases.folder(tmp_path, "gptq_v1.b4_asym_g32", change))
    assert "up_proj.qzeros may be damaged" in caplog.text


def test_biases_of_zeros_are_left_out_and_others_refused(tmp_path):
    gx.load(cases.folder(tmp_path, V1, lambda tensors, config: tensors.update({UP + "bias": np.zeros(32, np.float16)})))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"1 unknown \(model.layers.0.mlp.up_proj.bias\)"):
        gx.load(cases.folder(tmp_path / "b", V1, lambda t, c: t.update({UP + "bias": np.ones(32, np.float16)})))
