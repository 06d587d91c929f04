"""Names of tensors as other tools write them, what they leave in checkpoints, and tied tensors in several dtypes."""

import json

import ml_dtypes
import numpy as np
import pytest
from oracle import config, params
from test_hub import assert_same_bytes, folder_of, tensors

import garrulax as gx
from garrulax import models
from garrulax.hub import matching
from garrulax.hub.tensors import open_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYER = "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."


def matched(tmp_path, stored, case="llama_gqa"):
    folder = folder_of(case, tmp_path / "m", stored)
    c = config(case)
    return matching.match(open_tensors(folder), models.parameters(c), c, folder)


@pytest.mark.parametrize("case", ["llama_gqa", "gpt2"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: "_orig_mod." + name,  # torch.compile
        lambda name: "module." + name,  # DDP, DeepSpeed
        lambda name: "module._orig_mod." + name,
        lambda name: "_orig_mod.module." + name,
        lambda name: "base_model.model." + name,  # PEFT, merged
        lambda name: "_fsdp_wrapped_module." + name.replace("layers.0.", LAYER).replace("h.0.", "h.0._orig_mod."),
        lambda name: name.replace("model.", "model._orig_mod.", 1).replace("transformer.", "transformer._orig_mod.", 1),
        lambda name: "policy.net." + name,
    ],
    ids=["compile", "ddp", "compiled ddp", "ddp compiled", "peft", "fsdp", "compiled inside", "any other"],
)
def test_prefixes_of_other_tools_are_removed(case, wrap, tmp_path):
    stored = tensors(case)
    plain = matched(tmp_path, stored, case)
    wrapped = matched(tmp_path, {wrap(name): x for name, x in stored.items()}, case)
    assert {name: t.shape for name, t in wrapped.items()} == {name: t.shape for name, t in plain.items()}


def test_a_wrapped_model_has_the_numbers_of_the_plain_one(tmp_path):
    stored = {"module._orig_mod." + name: x for name, x in tensors("llama_gqa").items()}
    assert_same_bytes(gx.load(folder_of("llama_gqa", tmp_path / "m", stored)).params, params("llama_gqa"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {f"module.{k}": x for k, x in w.items()} | {"module.v_head.weight": w["model.norm.weight"]},
         r"config\.json: 1 unknown \(module\.v_head\.weight\)$"),
        (lambda w: {f"a.b{k}": x for k, x in w.items()}, "all unknown names begin with 'a.'"),
        (lambda w: w | {f"module.{k}": x for k, x in w.items()}, "all unknown names begin with 'module.'"),
        (lambda w: w | {"_orig_mod.model.norm.weight": w["model.norm.weight"]},
         "1 given twice under names that mean the same"),
        (lambda w: w | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": np.ones((2, 32), np.float32)},
         r"holds an adapter .*\(1 tensors such as model\.layers\.0\.self_attn\.q_proj\.lora_A.*merge it first"),
        (lambda w: {k.replace("q_proj", "q_proj.base_layer"): x for k, x in w.items()},
         "3 tensors such as .*base_layer"),
        (lambda w: {k.replace("up_proj.weight", "up_proj.qweight"): x for k, x in w.items()},
         "up_proj.qweight is part of quantised weights"),
        (lambda w: {k: x for k, x in w.items() if k != "lm_head.weight"},
         r"1 missing \(lm_head\.weight\); if the output head is .* tie_word_embeddings=true"),
    ],
    ids=["one more", "no prefix", "both", "one twice", "LoRA", "base layer", "GPTQ", "no head"],
)  # fmt: skip
def test_misfits_say_what_they_may_be(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        matched(tmp_path, change(tensors("llama_gqa")))
    assert "\n" not in str(caught.value)


def test_an_adapter_beside_a_model_is_not_applied_silently(tmp_path, caplog):
    folder = folder_of("llama_gqa", tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    gx.load(folder, only=("norm",))
    assert [line for line in caplog.messages if "adapter_config.json), which gx.load_adapter applies" in line]


def test_a_folder_with_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"it is an adapter .*and then gx.load_adapter"):
        gx.load(tmp_path)


@pytest.mark.parametrize("kinds", [("BF16", "F32"), ("F32", "F16"), ("BF16", "F16"), ("F64", "BF16"), ("F32", "F32")])
def test_tied_tensors_are_compared_by_value(kinds, tmp_path):
    """In whatever dtype they are stored; minus zero is zero, and NaN is NaN."""
    kinds = [{"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}[k] for k in kinds]
    rows = matching.streaming.STRAIGHT // 8 // 32 + 3  # a chunk and a bit
    values = np.random.default_rng(0).integers(-200, 200, (rows, 32)).astype(np.float32) / 64
    values[0, :2] = 0.0, np.nan
    for change in (0.0, 0.5):
        pair = [values.astype(kinds[0]), values.astype(kinds[1])]
        pair[1][0, 0] = -0.0
        pair[1][-1, -1] += kinds[1](change)
        layout = {name: (x.dtype, x.shape) for name, x in zip("ab", pair, strict=True)}
        write_tensors(tmp_path / "model.safetensors", layout, pair)
        found = open_tensors(tmp_path)
        assert matching._same_numbers(found["a"], found["b"]) == (change == 0)


def test_a_tied_head_in_another_dtype(tmp_path):
    stored = tensors("llama_tied")
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in stored.items()}
    same = half | {"lm_head.weight": half["model.embed_tokens.weight"].astype(np.float32)}
    model = gx.load(folder_of("llama_tied", tmp_path / "m", same), dtype="stored")
    assert model.params["tokens"].dtype == "bfloat16"
    with pytest.raises(ValueError, match="but they differ: it should say tie_word_embeddings=false"):
        gx.load(folder_of("llama_tied", tmp_path / "m", half | {"lm_head.weight": stored["model.embed_tokens.weight"]}))


def test_an_index_that_keeps_the_name_of_a_tied_head(tmp_path):
    stored = {k: x for k, x in tensors("llama_tied").items() if k != "lm_head.weight"}
    folder = folder_of("llama_tied", tmp_path / "m", stored)
    file = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / file)
    index = dict.fromkeys([*stored, "lm_head.weight"], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_same_bytes(gx.load(folder).params, params("llama_tied"))
