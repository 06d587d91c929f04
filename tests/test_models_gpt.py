"""The GPTs' formats, GPT-3's banded layers and GPT-1's blocks, beyond what all families have in common."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import FOLDER

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.models import gpt

TABLES = np.load(FOLDER / "tables.npz")  # masks of the sparse Transformer, by its authors' code
SIZES = {"vocab": 40, "context": 16, "width": 8, "layers": 2, "heads": 2}
FORMATS = {
    "gpt2": gpt.Config(**SIZES),
    "openai-gpt": gpt.Config(**SIZES, post_norm=True),
    "gpt3": gpt.Config(**SIZES, band=4),
    "gpt_neo": gpt.Config(**SIZES, band=4, qkv_bias=False, scale_attention=False),
}
CHANGED = {
    "vocab": 41, "context": 17, "width": 12, "layers": 3, "heads": 1, "mlp_width": 20, "activation": "relu",
    "norm_eps": 1e-2, "embedding_dropout": 0.4, "attention_dropout": 0.4, "residual_dropout": 0.4, "tied": False,
    "scale_attention": False, "scale_by_layer": True, "band": 3, "band_stride": 2, "band_parity": 0, "init_std": 0.03,
    "bos": 3, "eos": 4,
}  # fmt: skip
UNSAYABLE = {
    "gpt2": {"band_stride", "band_parity"},
    "openai-gpt": {"mlp_width", "scale_attention", "scale_by_layer", "band", "band_stride", "band_parity"},
    "gpt3": set(),
    "gpt_neo": {"scale_by_layer", "band_stride"},
}


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(gpt.Config) if f.name in CHANGED])
@pytest.mark.parametrize("dialect", FORMATS)
def test_every_format_keeps_every_setting_or_refuses_it_by_name(dialect, name):
    c, value = FORMATS[dialect], CHANGED[name]
    assert c.dialect == dialect
    if name in UNSAYABLE[dialect]:
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(c, **{name: value})
        return
    if (dialect, name) == ("gpt_neo", "scale_attention"):
        value = False  # all there is
    changed = dataclasses.replace(c, **{name: value})
    written = json.loads(json.dumps(gpt.to_hf(changed)))
    assert written["model_type"] == (dialect if (dialect, name) != ("gpt2", "band") else "gpt3")
    assert gpt.from_hf(written) == changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"band": -1}, "band=-1"),
        ({"band": 4.0}, r"band=4\.0"),
        ({"band": True}, "band=True"),
        ({"band": 4, "band_stride": -2}, "band_stride=-2"),
        ({"band": 4, "band_parity": 2}, "band_parity=2 must be 0 or 1"),
        ({"band": 4, "band_parity": False}, "band_parity=False"),
        ({"band_stride": 3}, "give their band"),
        ({"band_parity": 0}, "give their band"),
        ({"post_norm": 1}, "post_norm=1"),
        ({"qkv_bias": None}, "qkv_bias=None"),
        ({"post_norm": True, "qkv_bias": False}, "dialect 'openai-gpt' cannot say qkv_bias=False"),
        ({"post_norm": True, "activation": "gelu"}, "cannot say activation='gelu', only gelu_new"),
        ({"qkv_bias": False}, "dialect 'gpt_neo' cannot say scale_attention=True"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        gpt.Config(**changes)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"band": 4}, "sparse_local_w4"),
        ({"band": 1, "band_stride": 4}, "sparse_strided_s4"),
        ({"band": 4, "band_parity": 1}, "sparse_all"),
    ],
)
def test_a_banded_layer_sees_what_the_sparse_transformer_s_does(changes, seen):
    """In a model of one layer: which states change with each of 12 tokens."""
    c = gpt.Config(vocab=40, context=16, width=16, layers=1, heads=2, init_std=0.5, **{"band_parity": 0, **changes})
    tokens = np.tile(np.arange(12, dtype=np.int32), (13, 1))
    tokens[np.arange(12), np.arange(12)] = 30
    states, _ = jax.jit(models.hidden, static_argnums=2)(gx.init(c, jax.random.key(0)), tokens, c)
    moved = np.abs(states[:12] - states[12]).max(-1) > 1e-6  # [token changed, state]
    np.testing.assert_array_equal(moved.T, TABLES[seen])


def neo(**changes):
    return gpt.to_hf(gpt.Config(**SIZES | {"layers": 4}, band=4, qkv_bias=False, scale_attention=False)) | changes


@pytest.mark.parametrize(
    ("types", "band", "parity"),
    [
        ([[["global", "local"], 2]], 4, 1),
        ([[["local", "global"], 2]], 4, 0),
        ([[["global", "local"], 1], [["global"], 1], [["local"], 1]], 4, 1),
        ([[["global"], 4]], 0, 1),
        ([[["global", "local"], 1], [["global"], 2]], None, None),
        ([[["local"], 4]], None, None),
        ([[["global", "local"], 3]], None, None),
        ([[["global", "strided"], 2]], None, None),
        ([["global", "local"], 2], None, None),
        ([[["global", "local"], "2"]], None, None),
        ("global", None, None),
        (4, None, None),
    ],
)
def test_gpt_neo_s_kinds_of_layers(types, band, parity):
    raw = {k: v for k, v in neo(attention_types=types).items() if k != "attention_layers"}
    if band is None:
        with pytest.raises(ValueError, match=r"attention_types=.* is not implemented for 4 layers"):
            gpt.from_hf(raw)
    else:
        c = gpt.from_hf(raw)
        assert (c.band, c.band_parity) == (band, parity)
        assert gpt.from_hf(gpt.to_hf(c)) == c


def test_gpt_neo_s_absurd_depth_fills_no_memory():
    for layers in (10**10, 10**20):
        with pytest.raises(ValueError, match=f"is not implemented for {layers} layers"):
            gpt.from_hf(neo(num_layers=layers, attention_types=[[["global"], layers]]))


def test_gpt_neo_s_other_keys():
    with pytest.raises(ValueError, match="attention_types"):
        gpt.from_hf(neo(attention_layers=["global"] * 4))
    with pytest.raises(ValueError, match="window_size=0"):
        gpt.from_hf(neo(window_size=0))
    assert gpt.from_hf({k: v for k, v in neo().items() if k != "window_size"}).band == 256


def test_gpt1_s_published_config_json():
    raw = {
        "afn": "gelu", "architectures": ["OpenAIGPTLMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "openai-gpt", "n_ctx": 512,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512, "n_special": 0,
        "predict_special_tokens": True, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 40478,
    }  # fmt: skip
    assert gpt.from_hf(raw) == gx.preset("gpt1")
    assert gpt.from_hf(raw | {"afn": "silu"}).activation == "silu"
    with pytest.raises(ValueError, match="afn='gelu_new' is not implemented"):
        gpt.from_hf(raw | {"afn": "gelu_new"})


def test_a_gpt3_of_dense_layers_is_written_as_a_gpt2():
    banded = gx.preset("gpt3-125m")
    dense = dataclasses.replace(banded, band=0)
    assert gpt.to_hf(banded)["model_type"] == "gpt3"
    assert gpt.to_hf(dense)["model_type"] == "gpt2"
    assert not any("band" in key for key in gpt.to_hf(dense))
    names = [
        [s.names for s in spec.named_specs(gpt.parameters(c)).values()] for c in (banded, dense, gx.preset("gpt2"))
    ]
    assert names[0] == names[1] == names[2]


def test_initial_residual_projections_are_smaller_but_for_gpt1():
    """Four layers: 1/sqrt(8) of the others (Radford et al. 2019, section 2.3)."""
    for post_norm, ratio in ((False, 8**-0.5), (True, 1.0)):
        c = gpt.Config(vocab=40, context=16, width=128, layers=4, heads=2, post_norm=post_norm)
        specs = gpt.parameters(c)["blocks"]["mlp"]
        up, down = (specs[name].init(jax.random.key(0), specs[name].shape, jnp.float32) for name in ("up", "down"))
        assert float(down.std() / up.std()) == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("dialect", [pytest.param("openai-gpt", marks=pytest.mark.slow), "gpt3"])
def test_greedy_text_is_the_argmax_of_a_full_pass(dialect):
    """Beyond the band, for prompts of two lengths in one batch."""
    c = dataclasses.replace(FORMATS[dialect], context=48, width=32, heads=4, init_std=0.4, eos=None)
    params = gx.init(c, jax.random.key(0))
    prompts = [[5, 17, 3], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
    outs = gx.generate((params, c), prompts, max_new_tokens=12, temperature=0)
    texts = [np.array([*prompt, *out.tokens]) for prompt, out in zip(prompts, outs, strict=True)]
    rows = np.stack([np.pad(text, (0, 24 - len(text))) for text in texts])  # what is right of a token does not reach it
    best = jax.jit(gx.forward, static_argnums=2)(params, rows, c)[0].argmax(-1)
    for row, prompt, out in zip(best, prompts, outs, strict=True):
        np.testing.assert_array_equal(row[len(prompt) - 1 :][: len(out.tokens)], out.tokens)


@pytest.mark.parametrize(("row", "name", "number"), [("GPT-1", "gpt1", 1), ("GPT-2", "gpt2", 4), ("GPT-3", "gpt3-", 8)])
def test_every_published_size_has_a_preset(row, name, number, table):
    found = [preset for preset in gpt.PRESETS if preset.startswith(name) and "tiny" not in preset]
    assert len(found) == number
    table(row, "presets", number)
