"""Falcon: its ALiBi rounded as in training, config.json of three model types and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import arrays, config, params, relative_error

import garrulax as gx
from garrulax import models
from garrulax.layers.call import mask_and_cache
from garrulax.layers.rope import Rope

#: build_alibi_tensor of transformers 5.23.0, in float32: biases of the first and last two of so many heads.

pytestmark = pytest.mark.usefixtures("quick_compilation")

POSITIONS = [0, 1, 3, 11, 257, 1000, 3000]
ALIBI = {
    4: [[0, 0.25, 0.75, 2.75, 64, 250, 752], [0, 0.0625, 0.1875, 0.6875, 16, 62.5, 188],
        [0, 0.015625, 0.046875, 0.171875, 4, 15.625, 47], [0, 0.00390625, 0.01171875, 0.04296875, 1, 3.90625, 11.75]],
    71: [[0, 0.91796875, 2.75, 10.125, 235, 916, 2768], [0, 0.83984375, 2.515625, 9.25, 215, 840, 2528],
         [0, 0.62109375, 1.859375, 6.84375, 159, 620, 1872], [0, 0.5703125, 1.7109375, 6.28125, 146, 572, 1712]],
}  # fmt: skip


@pytest.mark.parametrize("heads", ALIBI)
def test_alibi_is_rounded_as_in_training(heads):
    """Also where the compiler may keep more precision than asked for."""
    c = models.falcon.Config(width=16 * heads, heads=heads, alibi=True)

    @jax.jit
    def bias(positions):
        mask, _ = mask_and_cache(jnp.zeros_like(positions), positions, None, None)
        return models.falcon.alibi(mask, c, jnp.float32)

    got = bias(jnp.asarray([POSITIONS]))
    assert got.shape == (1, heads, 1, len(POSITIONS))
    rows = np.asarray(got)[0, [0, 1, heads - 2, heads - 1], 0]
    np.testing.assert_array_equal(rows, np.asarray(ALIBI[heads], np.float32) / 4)  # sqrt(16): divided with the scores


def test_alibi_follows_the_token_not_the_slot():
    """Left padding shifts no position, so that rounded biases stay those of the unpadded text."""
    c, p, z = config("falconrw_alibi"), params("falconrw_alibi"), arrays("falconrw_alibi")
    text = jnp.asarray(z["input_ids"])
    far = jnp.arange(12)[None] + jnp.array([[0], [400]])
    near, _ = gx.forward(p, text, c, positions=far)
    assert relative_error(near[0], z["logits"][0]) <= 2e-6
    assert relative_error(near[1], z["logits"][1]) > 1e-3  # bfloat16 cannot tell position 400 from 401


# -- config.json ------------------------------------------------------------------------------------------------------

_RW = {
    "apply_residual_connection_post_layernorm": False, "architectures": ["RWForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig"}, "bias": False, "bos_token_id": 11, "eos_token_id": 11,
    "alibi": False, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "parallel_attn": True, "torch_dtype": "bfloat16", "transformers_version": "4.27.4", "use_cache": True,
    "vocab_size": 65024,
}  # fmt: skip
#: The first releases and their later files.
OLD_7B = _RW | {"model_type": "RefinedWebModel", "multi_query": True, "hidden_size": 4544, "n_head": 71, "n_layer": 32}
OLD_40B = _RW | {"model_type": "RefinedWeb", "hidden_size": 8192, "n_head": 128, "n_head_kv": 8, "n_layer": 60}
OLD_RW = _RW | {
    "model_type": "RefinedWebModel", "alibi": True, "bias": True, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 2048, "multi_query": False, "n_head": 32, "n_layer": 24, "parallel_attn": False, "vocab_size": 50304,
}  # fmt: skip
_SIZES = {"hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8}
NEW_40B = _RW | _SIZES | {"model_type": "falcon", "new_decoder_architecture": True}
NEW_11B = NEW_40B | {
    "hidden_size": 4096, "num_attention_heads": 32, "num_ln_in_parallel_attn": 1, "max_position_embeddings": 8192,
    "rope_theta": 500042.0, "ffn_hidden_size": None, "activation": "gelu", "ff_factor": 4,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "preset"),
    [
        (OLD_7B, "falcon-7b"), (OLD_40B, "falcon-40b"), (OLD_RW, "falcon-rw-1b"), (NEW_40B, "falcon-40b"),
        (NEW_11B, "falcon-11b"), (OLD_40B | {"new_decoder_architecture": True, "num_kv_heads": 8}, "falcon-40b"),
    ],
)  # fmt: skip
def test_files_of_every_age_give_the_presets(raw, preset):
    assert models.falcon.from_hf(raw) == gx.preset(preset)
    assert [m.__name__ for m in models.FAMILIES if any(d.claims(raw) for d in m.DIALECTS)] == ["falcon"]
    assert models.falcon.to_hf(gx.preset(preset))["model_type"] == "falcon"


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (NEW_40B, {"parallel_attn": False}, "new_decoder_architecture with parallel_attn=False"),
        (NEW_40B, {"num_ln_in_parallel_attn": 3}, "norms=3: a block has 2, or 1"),
        (NEW_40B, {"new_decoder_architecture": False, "multi_query": False}, "num_kv_heads=8 needs new_decoder"),
        (NEW_40B, {"n_head": 64}, "num_attention_heads=128 and n_head=64 disagree"),
        (NEW_40B, {"num_kv_heads": 7}, "heads 128 is not a multiple of kv_heads 7"),
        (NEW_40B, {"new_decoder_architecture": "yes"}, "new_decoder_architecture='yes' must be true or false"),
        (NEW_40B, {"multi_query": 1}, "multi_query=1 must be true or false"),
        (NEW_40B, {"apply_residual_connection_post_layernorm": True}, "post_layernorm=True is not implemented"),
        (NEW_40B, {"hidden_size": 8200}, "width 8200 is not a multiple of heads 128"),
        (NEW_40B, {"sliding_window": 4}, "unknown keys sliding_window"),
        (OLD_7B, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 needs new_decoder_architecture"),
        (OLD_7B, {"n_layer": None}, "lacks 'num_hidden_layers'"),
        (OLD_7B, {"activation": "swiglu"}, "unknown activation 'swiglu'"),
        (OLD_7B, {"hidden_size": 71}, "head_dim 1 must be even"),
        (OLD_RW, {"rope_theta": 5.0}, "alibi takes the place of rotary positions"),
    ],
)
def test_a_config_json_that_cannot_be_is_refused_by_name(raw, changes, message):
    with pytest.raises(ValueError, match=message):
        models.falcon.from_hf(raw | changes)


def test_settings_that_no_config_json_says_are_refused():
    c = config("falcon40b")
    with pytest.raises(ValueError, match="norms=1: a block has 2, or 1 where attention and MLP are parallel"):
        dataclasses.replace(c, parallel=False, norms=1)
    with pytest.raises(ValueError, match="cannot say groups of queries without parallel"):
        dataclasses.replace(c, parallel=False)
    with pytest.raises(ValueError, match="alibi takes the place"):
        dataclasses.replace(c, alibi=True, rope=Rope(theta=5.0))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("norms", [1, 2])
def test_every_parallel_block_comes_back(kv_heads, norms):
    """Two descriptions of one layout: the old architecture is the new one with one key/value head, or all."""
    c = dataclasses.replace(config("falcon40b"), kv_heads=kv_heads, norms=norms)
    assert models.falcon.from_hf(models.falcon.to_hf(c)) == c
