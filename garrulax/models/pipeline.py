"""The layers of a model as the stages of a pipeline: GPipe (Huang et al. 2019, arXiv 1811.06965) over a mesh axis.

Each device along `pipeline` holds the layers of one stage. The rows of a batch are divided into microbatches. In every
round a stage runs its layers on one microbatch and passes the result on to the next stage; S stages and M microbatches
take M + S - 1 rounds, of which each stage waits in S - 1. The backward pass is the same schedule from the end, which
JAX derives from it. Every stage looks up the tokens' embeddings in the whole table, which is gathered once; the logits
it computes are those of its part of the vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from garrulax.core.config import ModelConfig
from garrulax.core.einsum import lookup
from garrulax.core.sharding import axis_names, spec_of
from garrulax.core.spec import Tree
from garrulax.core.strategies import PIPELINE_AXIS
from garrulax.layers.call import Call, Stage
from garrulax.models.contract import Family

#: Microbatches a stage: with four a stage waits in a fifth of the rounds, at most.
MICROBATCHES = 4


def stages(params: Tree) -> int:
    """How many stages the parameters are split into; 1 without a mesh that has the axis `pipeline`."""
    leaf = jax.tree.leaves(params["blocks"])[0]
    mesh = jax.typeof(leaf).sharding.mesh
    split = not mesh.empty and PIPELINE_AXIS in axis_names(spec_of(leaf)[0])
    return mesh.shape[PIPELINE_AXIS] if split else 1


def microbatches(rows: int, count: int) -> int:
    """How many microbatches `rows` rows of a device make for `count` stages: the most up to four a stage.

    Raises:
        ValueError: They make fewer than one a stage.
    """
    most = max(m for m in range(1, count * MICROBATCHES + 1) if rows % m == 0)
    if most < count:
        raise ValueError(
            f"{rows} rows a device make {most} microbatches, which keep fewer than {count} stages of a pipeline busy: "
            f"use a multiple of {count}"
        )
    return most


def pipelined(module: Family, params: Tree, call: Call, config: ModelConfig) -> jax.Array:
    """A family's hidden states, each stage of the layers computed by the devices that hold it.

    Args:
        module: The family.
        params: Parameters whose layers are split over `pipeline`.
        call: The forward pass, without cache and dropout.
        config: Of the model.

    Returns:
        [B, T, D], the same on all stages.

    Raises:
        ValueError: The call has a cache or dropout, or the rows of a device do not make enough microbatches.
    """
    if call.cache is not None or call.key is not None:
        raise ValueError("a pipeline of layers has neither cache nor dropout: use a mesh without the axis pipeline")
    count = stages(params)
    mesh = jax.typeof(call.tokens).sharding.mesh
    rows = len(call.tokens) // math.prod(mesh.shape[name] for name in axis_names(spec_of(call.tokens)[0]))
    parts = microbatches(rows, count)
    arrays = jax.tree.map(lambda x: _divided(x, parts), (call.tokens, call.positions, call.mask))
    params = {name: part if name == "blocks" else jax.tree.map(_on_all_stages, part) for name, part in params.items()
              if name != "head"}  # fmt: skip

    def stage(params: Tree, arrays: Any) -> jax.Array:
        index = jax.lax.axis_index(PIPELINE_AXIS)

        def part(number):
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), arrays)

        def step(received, number):
            tokens, positions, mask = part(jnp.clip(number - index, 0, parts - 1))
            own = dataclasses.replace(call, tokens=tokens, positions=positions, mask=mask, stage=Stage(index, received))
            x, _ = module.hidden(params, own, config)
            return jax.lax.ppermute(x, PIPELINE_AXIS, [(i, i + 1) for i in range(count - 1)]), x

        embedded = jnp.zeros_like(lookup(params["tokens"], part(0)[0]))  # perhaps of another width than the layers
        nothing = jnp.broadcast_to(embedded[..., :1], (*embedded.shape[:-1], config.width))
        _, done = jax.lax.scan(step, nothing, jnp.arange(parts + count - 1, dtype=jnp.int32))
        return jax.lax.psum(jnp.where(index == count - 1, done[count - 1 :], 0), PIPELINE_AXIS)

    split = {name: P(PIPELINE_AXIS) if name == "blocks" else P() for name in params}
    run = jax.shard_map(stage, in_specs=(split, P()), out_specs=P(), axis_names={PIPELINE_AXIS}, check_vma=False)
    x = run(params, arrays)  # [M, B / M, T, D]
    entries = spec_of(x)
    return jax.lax.reshape(x.swapaxes(0, 1), (len(call.tokens), *x.shape[2:]), out_sharding=P(*entries[1:]))


def _on_all_stages(x: jax.Array) -> jax.Array:
    """A table whose rows the stages share, gathered over them."""
    names = [tuple(name for name in axis_names(entry) if name != PIPELINE_AXIS) for entry in spec_of(x)]
    return jax.sharding.reshard(x, P(*(one[0] if len(one) == 1 else one or None for one in names)))


def _divided(x: jax.Array, parts: int) -> jax.Array:
    """x [B, ...] as [parts, B / parts, ...]: every part has rows of every device."""
    if len(x) == 1:  # positions that all rows share
        return jnp.broadcast_to(x[None], (parts, *x.shape))
    entries = spec_of(x)
    shape = (len(x) // parts, parts, *x.shape[1:])
    return jax.lax.reshape(x, shape, out_sharding=P(entries[0], None, *entries[1:])).swapaxes(0, 1)
