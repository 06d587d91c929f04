"""What fine-tuning adds to a language model: rows for new tokens, and a linear head on the state of one token.

Letters: B examples, S sequences of an example, T tokens, D model width, N outputs, V vocabulary.
Source: Radford et al. 2018, sections 3.2 and 3.3; openai/finetune-transformer-lm train.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.einsum import einsum, gather
from garrulax.core.spec import Declare, Tree, normal
from garrulax.layers.dropout import dropout
from garrulax.models import parameters


def add_tokens(params: Tree, config: Any, count: int, key: jax.Array) -> tuple[Tree, Any]:
    """Parameters and config with `count` more tokens, whose ids follow the vocabulary's; their rows in the embedding
    (and in an output of its own) are drawn as at initialisation. params: of `config`; the other leaves are shared."""
    wider = dataclasses.replace(config, vocab=config.vocab + count)
    specs = parameters(wider)
    rows: dict[str, jax.Array] = {}
    for name in ("tokens", "head"):
        if name in specs:
            old = params[name]
            new = specs[name].init(jax.random.fold_in(key, len(rows)), (count, old.shape[1]), old.dtype)
            rows[name] = jnp.concatenate([old, new])
    return {**params, **rows}, wider


def classifier(config: Any, outputs: int) -> Tree:
    """The ParamSpec tree of a linear head, to stand beside a model's parameters as `classifier`. Hugging Face's
    OpenAIGPTDoubleHeadsModel has it under these names."""
    declare = Declare(normal(config.init_std), D=config.width, N=outputs)
    head = declare.linear("weight", "multiple_choice_head.summary", "N D -> D N", bias=True)
    return {"weight": dataclasses.replace(head["weight"], role="embedding"), "bias": head["weight_bias"]}


def state_at(x: jax.Array, at: jax.Array) -> jax.Array:
    """The hidden state of one token a sequence: of x [..., T, D] those at int32 [...], as [..., D]."""
    here = jnp.arange(x.shape[-2], dtype=at.dtype) == at[..., None]
    return jnp.sum(jnp.where(here[..., None], x, 0), axis=-2)  # one term is not 0; unlike a gather, T may be sharded


def score(states: jax.Array, p: Tree, *, choose: bool, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
    """Logits of the examples from the states [B, S, D] of their sequences and a head p.

    choose: False adds up the states of the sequences (of one text, or of two in both orders) and gives [B, N]; True
    gives [B, S], one logit a sequence from a head with one output. rate, key: dropout of the states, the same for all
    sequences of an example.
    """
    if not choose:
        states = states.sum(axis=1, keepdims=True)
    batch, _, width = states.shape
    states = dropout(states, rate, key, (batch, 1, width))
    y = einsum("BSD,DN->BSN", states, p["weight"]) + gather(p["bias"], states.dtype)
    return y[:, :, 0] if choose else y[:, 0]
