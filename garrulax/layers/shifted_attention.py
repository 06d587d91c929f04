"""LongLoRA's shifted attention (Chen et al. 2023, arXiv 2309.12307): training on long texts at the cost of short ones.

Half of the heads are causal within groups of tokens, the other half within groups that begin half a group later, so
that neighbouring groups exchange information. Without it, at inference, the model attends to the whole text as ever.

Letters: B batch, T tokens, H heads, K key/value heads, C head width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels import attention
from garrulax.kernels.mask import Band, Mask


def shifted_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, group: int, options: dict[str, Any]
) -> jax.Array:
    """Attention within groups.

    The first and the last half group of the second half of the heads are groups of their own, as in the authors' later
    code. Their first code rolls the tokens, so that the first ones attend to the end of the text.

    Args:
        query: [B, T, H, C].
        key: [B, T, K, C].
        value: [B, T, K, C].
        mask: Of the layer, with the stream `position`.
        group: Number of tokens, at least 2.
        options: Further arguments of `kernels.attention`.

    Returns:
        [B, T, H, C].

    Raises:
        ValueError: The heads have no halves, or the model adds something to the scores of each head.
    """
    heads, pairs = query.shape[2], key.shape[2]
    if group < 2:
        raise ValueError(f"group={group} of shifted attention must be at least 2 tokens")
    if heads % 2 or (pairs % 2 and pairs > 1):
        raise ValueError(f"shifted attention needs an even number of heads, not {heads} with {pairs} key/value heads")
    if options.get("alibi") is not None or options.get("bias") is not None or options.get("sinks") is not None:
        raise ValueError("shifted attention is for models whose scores have no bias: those with rotary positions")
    both = range(2)
    keys, values = ([x] * 2 if pairs == 1 else jnp.split(x, 2, axis=2) for x in (key, value))
    position = mask.query["position"]
    starts = (0, group - group // 2)
    masks = [
        dataclasses.replace(
            mask, query={**mask.query, "group": (position + s) // group}, rule=mask.rule & Band("group", 0, 0)
        )
        for s in starts
    ]
    queries = jnp.split(query, 2, axis=2)
    return jnp.concatenate([attention(queries[i], keys[i], values[i], mask=masks[i], **options) for i in both], axis=2)
