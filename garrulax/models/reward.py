"""Reward models: any family with a linear head that gives one number for a text.

The head reads the hidden state, after the last norm, of the last token of the text, whatever stands behind it. Its
parameters stand beside the model's under the name `reward`. Sources: Ziegler et al. 2019 (initialisation); Ouyang et
al. 2022, section 3.5 (bias).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.dtypes import at_least_float32
from garrulax.core.einsum import einsum, gather
from garrulax.core.spec import Declare, Tree, normal
from garrulax.models.forward_pass import hidden, parameters
from garrulax.models.heads import state_at

NAME = "reward"


def reward_specs(config: ModelConfig) -> Tree:
    """The ParamSpec tree of a model with a reward head."""
    return {**parameters(config), NAME: head_specs(config)}


def head_specs(config: ModelConfig) -> Tree:
    """The ParamSpec tree of a head with one output, whose weight has the standard deviation 1 / sqrt(width + 1)."""
    declare = Declare(normal((config.width + 1) ** -0.5), D=config.width, N=1)
    head = declare.linear("weight", "score", "N D -> D N", bias=True)
    weight = dataclasses.replace(head["weight"], role="embedding")
    return {"weight": weight, "bias": head["weight_bias"]}


def add_reward_head(params: Tree, config: ModelConfig, key: jax.Array) -> Tree:
    """The parameters of a model with those of a new reward head."""
    return {**params, **spec.init({NAME: head_specs(config)}, key)}


def scores(
    params: Tree,
    tokens: jax.Array,
    length: jax.Array,
    config: ModelConfig,
    *,
    key: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """The reward of every text.

    Args:
        params: Of a model with a reward head.
        tokens: int32 [B, T], padding at the right.
        length: Number of tokens of each text, int32 [B]; a place with 0 tokens gives some number.
        config: Of the model.
        key: PRNG key for dropout; None is without dropout.
        **options: Passed on to `models.hidden`.

    Returns:
        [B], in at least float32.
    """
    x, _ = hidden(without_head(params), tokens, config, key=key, **options)
    return score(params[NAME], state_at(x, jnp.maximum(length - 1, 0)))


def score(head: Tree, states: jax.Array) -> jax.Array:
    """A head's output for hidden states [B, D] or [B, T, D]: [B] or [B, T], in at least float32."""
    states = states.astype(at_least_float32(states.dtype))
    rows = "BT"[: states.ndim - 1]
    outputs = einsum(f"{rows}D,DN->{rows}N", states, head["weight"]) + gather(head["bias"], states)
    return outputs[..., 0]


def without_head(params: Tree) -> Tree:
    """The parameters of the model alone."""
    return {name: part for name, part in params.items() if name != NAME}


def centred(params: Tree, mean: jax.Array | float) -> Tree:
    """The parameters with `mean` taken off the bias: after training, the mean reward of the demonstrations.

    Rewards of a pair are only compared, so that training does not fix their mean.
    """
    head = params[NAME]
    return {**params, NAME: {**head, "bias": head["bias"] - jnp.asarray(mean, head["bias"].dtype)}}
