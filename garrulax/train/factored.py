"""Adafactor for trees whose layers are stacked and whose matrices may have several input or output dimensions."""

import math

import jax
import jax.numpy as jnp
import optax

from garrulax.core.spec import ParamSpec, Tree, map_specs


def scale_by_adafactor(specs: Tree) -> optax.GradientTransformation:
    """Optax's Adafactor (Shazeer & Stern 2018) without learning rate, for each layer's matrix on its own.

    Optax factors the second moment along the two largest dimensions, and takes the root mean square of an update and of
    a parameter over the whole array. Here an array is a stack of layers, and a matrix may be [D, H, C]: every array
    becomes [layers, inputs, outputs] first, and Optax sees one layer of it.

    Args:
        specs: ParamSpec tree of the parameters.
    """
    one = optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    )  # the parts and constants of optax.adafactor

    def layered(tree: Tree) -> Tree:
        return map_specs(lambda s, x: x.reshape(layered_shape(s)), specs, tree)

    def init(params):
        # Only shapes matter: zeros have no sharding that a reshape could not keep.
        zeros = map_specs(lambda s, p: jnp.zeros(layered_shape(s), p.dtype), specs, params)
        return jax.tree.map(jax.vmap(one.init), zeros)

    def update(updates, state, params):
        if jax.sharding.get_abstract_mesh().empty:
            return on_one_device(updates, state, params)
        # Explicit mode refuses reshapes that merge two split dimensions: the partitioner does them.
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(on_one_device, out_sharding=shardings)(updates, state, params)

    def on_one_device(updates, state, params):
        def each(s, u, state, p):
            out, state = jax.vmap(one.update)(u, state, p)
            return out.reshape(s.shape), state

        pairs = map_specs(each, specs, layered(updates), state, layered(params))
        return map_specs(lambda _, pair: pair[0], specs, pairs), map_specs(lambda _, pair: pair[1], specs, pairs)

    return optax.GradientTransformation(init, update)


def layered_shape(s: ParamSpec) -> tuple[int, ...]:
    """[layers, inputs, outputs] of a matrix, [layers, ...] of other parameters; layers is 1 for what is not stacked."""
    shape = s.layer_shape
    if s.role == "matrix":
        shape = (math.prod(shape[: s.inputs]), math.prod(shape[s.inputs :]))
    return (s.layers or 1, *shape)
