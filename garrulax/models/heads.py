"""Additions to a language model for fine-tuning: rows for new tokens, and a linear head on the state of one token.

Letters: B examples, S sequences of an example, T tokens, D model width, N outputs, V vocabulary.
Source: Radford et al. 2018, sections 3.2 and 3.3; openai/finetune-transformer-lm train.py.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from garrulax.core.config import ModelConfig
from garrulax.core.einsum import einsum, gather
from garrulax.core.leaf import check_arrays
from garrulax.core.spec import Declare, Tree, normal
from garrulax.layers.dropout import dropout
from garrulax.models import gpt, parameters

Config = TypeVar("Config", bound=ModelConfig)


def add_tokens(params: Tree, config: Config, count: int, key: jax.Array) -> tuple[Tree, Config]:
    """Adds tokens to the end of the vocabulary.

    Their rows in the embedding, and in the output head if it is not tied, are drawn as at initialisation.

    Args:
        params: Of the model.
        config: Of the model.
        count: Number of new tokens.
        key: PRNG key for the new rows.

    Returns:
        The parameters, which share all other leaves with `params`, and the config.
    """
    wider = dataclasses.replace(config, vocab=config.vocab + count)
    specs = parameters(wider)
    rows: dict[str, jax.Array] = {}
    for name in ("tokens", "head"):
        if name in specs:
            old = params[name]
            check_arrays(old, "add_tokens")
            new = specs[name].init(jax.random.fold_in(key, len(rows)), (count, old.shape[1]), old.dtype)
            rows[name] = jnp.concatenate([old, new])
    return {**params, **rows}, wider


def classifier(config: gpt.Config, outputs: int) -> Tree:
    """The ParamSpec tree of a linear head, which belongs under the name `classifier` beside a model's parameters.

    The names in a checkpoint are those of Hugging Face's OpenAIGPTDoubleHeadsModel.

    Args:
        config: Of the model.
        outputs: N.
    """
    declare = Declare(normal(config.init_std), D=config.width, N=outputs)
    head = declare.linear("weight", "multiple_choice_head.summary", "N D -> D N", bias=True)
    return {"weight": dataclasses.replace(head["weight"], role="embedding"), "bias": head["weight_bias"]}


def state_at(x: jax.Array, index: jax.Array) -> jax.Array:
    """Picks the hidden state of one token of every sequence.

    Args:
        x: Hidden states [..., T, D].
        index: Of the token, int32 [...].

    Returns:
        [..., D].
    """
    selected = jnp.arange(x.shape[-2], dtype=index.dtype) == index[..., None]  # [..., T]
    # A sum with one term that is not 0: unlike a gather, it works if T is sharded.
    return jnp.sum(jnp.where(selected[..., None], x, 0), axis=-2)


def head_logits(
    states: jax.Array, p: Tree, *, choose: bool, rate: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
    """Applies a head to the states of the sequences of every example.

    Args:
        states: [B, S, D].
        p: Parameters of the head: weight [D, N], bias [N].
        choose: False adds the states of the S sequences (one text, or two texts in both orders) and classifies the sum.
            True gives every sequence one logit, from a head with N = 1: to choose among answers.
        rate: Of dropout of the states; all sequences of an example lose the same entries.
        key: PRNG key for dropout; None is without dropout.

    Returns:
        [B, N], or [B, S] if `choose`.
    """
    if not choose:
        states = states.sum(axis=1, keepdims=True)  # [B, 1, D]
    batch, _, width = states.shape
    states = dropout(states, rate, key, (batch, 1, width))
    logits = einsum("BSD,DN->BSN", states, p["weight"]) + gather(p["bias"], states)
    return logits[:, :, 0] if choose else logits[:, 0]
