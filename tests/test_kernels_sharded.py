"""Attention on meshes of eight devices against one device: outputs and every gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core.sharding import make_mesh
from garrulax.kernels.dense import Dense
from garrulax.kernels.mask import Mask
from garrulax.kernels.sharded import Sharded
from garrulax.kernels.xla import Chunked

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = Chunked(block_q=8, block_k=8)
BOUNDS = {"float32": 2e-6, "float64": 1e-13}


def placed(mesh, x, *axes):
    """x with its first dimensions split over these axes, those of size 1 left whole."""
    spec = P(*(axis if n > 1 else None for n, axis in zip(x.shape, axes, strict=False)))
    return jax.device_put(x, NamedSharding(mesh, spec))


def assert_same_on_mesh(mesh, layout, case, shape, implementation, *, extras=(), precision="float32", one=SMALL):
    """layout: the mesh axes of (batch, length, query heads, key heads)."""
    T, S, H = shape[:3]
    batch, length, heads, kv_heads = layout
    mesh = make_mesh(mesh)
    with jax.enable_x64(precision == "float64"):
        mask = cases.CASES[case](T)
        if {"alibi", "relative"} & set(extras):
            mask = cases.with_positions(mask)
        *operands, cotangent = (jnp.asarray(x, precision) for x in cases.inputs(*shape))
        options = {name: x for e in extras for name, x in cases.extra(e, H, T, S).items()}
        floating = lambda x: jnp.asarray(x, precision) if getattr(x, "dtype", None) == np.float64 else x  # noqa: E731
        options = jax.tree.map(floating, options)
        expected = cases.run(operands, cotangent, mask, options, one)
        with jax.set_mesh(mesh):
            query, cotangent = (placed(mesh, x, batch, length, heads) for x in (operands[0], cotangent))
            key, value = (placed(mesh, x, batch, length, kv_heads) for x in operands[1:])
            streams = Mask(
                {name: placed(mesh, s, batch, length) for name, s in mask.query.items()},
                None if mask.key is None else {name: placed(mesh, s, batch, length) for name, s in mask.key.items()},
                mask.rule,
            )
            got = cases.run((query, key, value), cotangent, streams, options, implementation)
    error = jax.tree.map(cases._relative_error, got, expected)
    assert max(jax.tree.leaves(error)) <= BOUNDS[precision], error


BATCH_AND_HEADS = ("data", None, "tensor", "tensor")
SEQUENCE = ("data", "sequence", "tensor", "tensor")
ALONE = (None, "sequence", None, None)


@pytest.mark.parametrize("implementation", [SMALL, Dense()], ids=["two passes", "dense"])
@pytest.mark.parametrize("extra", cases.EXTRAS)
def test_batch_and_heads(implementation, extra):
    assert_same_on_mesh(
        "data=2,tensor=4", BATCH_AND_HEADS, "packed", (24, 24, 8, 4, 8), implementation, extras=(extra,),
        precision="float64", one=Dense(),
    )  # fmt: skip


@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (12, 3), (12, 6), (4, 2)], ids=str)
def test_fewer_key_heads_than_devices(heads):
    """Each device reads the keys of its queries; the gradient of shared ones is summed."""
    H, K = heads
    layout = ("data", None, "tensor", None)
    assert_same_on_mesh("data=2,tensor=4", layout, "prefix", (12, 12, H, K, 8), SMALL, precision="float64")


@pytest.mark.parametrize("way", ["gather", "ring"])
@pytest.mark.parametrize("case", cases.CASES)
def test_sequence(case, way):
    assert_same_on_mesh("sequence=8", ALONE, case, (64, 64, 2, 1, 8), Sharded(SMALL, way))


@pytest.mark.parametrize("way", ["gather", "ring"])
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("case", ["packed", "infilling", "sinks_and_window"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 1)], ids=str)
def test_sequence_with_batch_and_heads(heads, case, precision, way):
    layout = SEQUENCE if heads[1] > 1 else (*SEQUENCE[:3], None)
    assert_same_on_mesh(
        "data=2,tensor=2,sequence=2", layout, case, (32, 32, *heads, 8, 12), Sharded(SMALL, way), precision=precision
    )


@pytest.mark.parametrize("way", ["gather", "ring"])
@pytest.mark.parametrize("extra", cases.EXTRAS)
def test_extras_with_sequence(extra, way):
    if extra == "dropout" and way == "ring":
        with pytest.raises(ValueError, match="a ring would drop other probabilities"):
            assert_same_on_mesh("sequence=8", ALONE, "window", (32, 32, 4, 2, 8), Sharded(SMALL, way), extras=(extra,))
        return
    assert_same_on_mesh(
        "tensor=2,sequence=4", (None, "sequence", "tensor", "tensor"), "window", (32, 32, 4, 2, 8), Sharded(SMALL, way),
        extras=(extra,), precision="float64",
    )  # fmt: skip
