"""Adapters of several rows: parameters in which every row of a batch has a pair of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from garrulax.core.leaf import Tree, map_weights
from garrulax.core.lora import Lora


def by_row(trees: Sequence[Tree], index: Sequence[int]) -> Tree:
    """Parameters with which row i of a batch computes what `trees[index[i]]` does.

    Args:
        trees: Parameters that share their weights, with different adapters or none.
        index: The tree of every row.

    Raises:
        ValueError: Two of them differ in more than pairs of low rank.
    """
    chosen = np.asarray(index, np.int32)

    def one(*same: Any) -> Any:
        bases = [w.base if isinstance(w, Lora) else w for w in same]
        if any(base is not bases[0] for base in bases):
            raise ValueError(
                "adapters of one batch must share the weights of the model, but one brings weights of its own (biases, "
                "modules_to_save, rows of tokens), or another model's: give its prompts in a call of their own"
            )
        pairs = [w for w in same if isinstance(w, Lora)]
        if not pairs:
            return same[0]
        if any(pair.magnitude is not None or pair.bias is not None for pair in pairs):
            raise ValueError("adapters with DoRA or lora_bias cannot share a batch: give their prompts in own calls")
        return _rows(same, pairs[0], max(pair.rank for pair in pairs), chosen)

    return map_weights(one, trees[0], *trees[1:])


def _rows(same: Sequence[Any], like: Lora, rank: int, chosen: np.ndarray) -> Lora:
    axis = int(like.stacked)

    def padded(w: Any) -> Lora:
        if not isinstance(w, Lora):
            zeros = {name: jnp.zeros_like(getattr(like, name)) for name in ("a", "b", "scale")}
            w = dataclasses.replace(like, **zeros)
        more = rank - w.rank
        a = jnp.pad(w.a, [(0, 0)] * (w.a.ndim - 1) + [(0, more)])
        b = jnp.pad(w.b, [(0, more) if i == axis else (0, 0) for i in range(w.b.ndim)])
        return dataclasses.replace(w, a=a, b=b)

    pairs = [padded(w) for w in same]

    def gathered(name: str) -> Any:
        return jnp.take(jnp.stack([getattr(pair, name) for pair in pairs], axis), chosen, axis)

    return Lora(like.base, gathered("a"), gathered("b"), gathered("scale"))
