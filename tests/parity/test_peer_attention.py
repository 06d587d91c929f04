"""Masks and T5's relative bias against what transformers makes of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from garrulax.kernels import masks
from garrulax.kernels.relative import t5

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import torch
from transformers import masking_utils
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Attention


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("max_distance", [33, 100, 128, 250, 1000])
@pytest.mark.parametrize("buckets", [6, 8, 20, 32, 33, 64])
def test_t5_relative_bias(buckets, max_distance, decoder):
    config = T5Config(
        d_model=8, d_kv=4, num_heads=2, relative_attention_num_buckets=buckets, is_decoder=decoder,
        relative_attention_max_distance=max_distance,
    )  # fmt: skip
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    length = 2 * max_distance + 3
    with torch.no_grad():
        # The outermost row and column hold every distance there is.
        bias = layer.compute_bias(length, length)[0].numpy()
    expected = np.concatenate([bias[:, 0, :0:-1], bias[:, :, 0]], axis=1)
    table = jnp.asarray(layer.relative_attention_bias.weight.detach().numpy())
    ours = t5(table, bidirectional=not decoder, max_distance=max_distance)
    distance = np.concatenate([np.arange(length - 1, 0, -1), -np.arange(length)])
    got = np.asarray(ours.steps)[np.searchsorted(ours.starts, distance, side="right")].T
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("width", [1, 3, 50])
def test_windows(width):
    """Mistral's, over rows padded in front, as transformers' mask functions have it."""
    length = 20
    valid = np.ones((2, length), bool)
    valid[1, :6] = False
    function = masking_utils.and_masks(
        masking_utils.sliding_window_causal_mask_function(width),
        masking_utils.padding_mask_function(torch.tensor(valid)),
    )
    b, i, j = np.ogrid[:2, :length, :length]
    peer = function(*(torch.tensor(x) for x in (b, 0 * b, i, j))).numpy()
    ours = np.asarray(masks.window(jnp.where(jnp.asarray(valid), 0, -1), width).dense())
    np.testing.assert_array_equal(ours[valid], peer[valid])  # a padding query sees nothing of ours
