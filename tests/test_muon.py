"""Muon on meshes of eight devices: the numbers of one device, and the work of one device shared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from garrulax import models
from garrulax.core import spec
from garrulax.core.collectives import collectives
from garrulax.core.sharding import make_mesh, shardings
from garrulax.train.muon import newton_schulz, orthogonalised

pytestmark = pytest.mark.usefixtures("quick_compilation")
#: Of each layer 2 square matrices (query, out), 2 of key and value, 3 of the feed-forward layer.
CONFIG = models.llama.Config(vocab=64, context=16, width=32, layers=8, heads=4, kv_heads=2, mlp_width=88, tied=True)


@functools.cache
def matrices(layers):
    named = spec.named_specs(models.llama.parameters(dataclasses.replace(CONFIG, layers=layers)))
    specs = {name: s for name, s in named.items() if s.role == "matrix"}
    rng = np.random.default_rng(0)
    return list(specs.values()), [rng.normal(size=s.shape) for s in specs.values()]


def compiled(mesh, strategy, layers):
    specs, arrays = matrices(layers)
    places = [p.spec for p in shardings(dict(enumerate(specs)), mesh, strategy).values()]
    placed = [jax.device_put(x, NamedSharding(mesh, p)) for x, p in zip(arrays, places, strict=True)]
    return jax.jit(lambda x: orthogonalised(x, specs)).lower(placed).compile(), placed


@pytest.mark.parametrize(
    ("axes", "strategy", "layers", "factor"),
    [
        ("data=2,fsdp=2,tensor=2", "fsdp+tp", 8, 1.02),
        pytest.param("data=2,fsdp=2,tensor=2", "fsdp+tp", 3, 1.8, marks=pytest.mark.slow),  # 21 matrices, as 8 + 8 + 16
        pytest.param("data=2,fsdp=2,tensor=2", "hsdp", 8, 1.02, marks=pytest.mark.slow),
        pytest.param("fsdp=8", "fsdp", 8, 1.02, marks=pytest.mark.slow),
        pytest.param("data=8", "ddp", 8, 1.02, marks=pytest.mark.slow),
        pytest.param("data=4,tensor=2", "tp", 8, 1.02, marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_the_numbers_are_those_of_one_device_and_the_work_is_shared(axes, strategy, layers, factor):
    with jax.enable_x64(True):
        specs, arrays = matrices(layers)
        alone = jax.jit(lambda x: orthogonalised(x, specs)).lower(arrays).compile()
        mesh = make_mesh(axes)
        with jax.set_mesh(mesh):
            shared, placed = compiled(mesh, strategy, layers)
            for got, x, want in zip(shared(placed), placed, alone(arrays), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
                assert got.sharding.is_equivalent_to(x.sharding, x.ndim)
    assert shared.cost_analysis()["flops"] * 8 <= factor * alone.cost_analysis()["flops"]
    held = sum(x.addressable_shards[0].data.nbytes for x in placed)
    assert max(c.bytes for c in collectives(shared.as_text(), mesh.shape)) <= factor * held


def test_newton_schulz_is_the_polynomial_of_the_singular_values():
    with jax.enable_x64(True):
        x = np.random.default_rng(1).normal(size=(2, 5, 9))
        u, sizes, v = np.linalg.svd(x, full_matrices=False)
        sizes = sizes / np.linalg.norm(sizes, axis=1, keepdims=True)
        for _ in range(5):
            sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
        np.testing.assert_allclose(newton_schulz(jnp.asarray(x)), (u * sizes[:, None]) @ v, atol=1e-7)


def hard_matrices(rows, columns):
    """[7, rows, columns]: noise, condition numbers of 1e2 and 1e6, one large value, half rank, a mean, zeros."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(rows, columns))
    u, _, v = np.linalg.svd(noise, full_matrices=False)
    sizes = [np.logspace(0, -2, rows), np.logspace(0, -6, rows), np.r_[1, np.full(rows - 1, 0.01)], np.arange(rows) % 2]
    return np.stack([noise, *((u * s) @ v for s in sizes), noise + 3, 0 * noise])


@pytest.mark.parametrize(("rows", "columns"), [(48, 192), (48, 48)])
def test_in_bfloat16_matrices_are_near_those_of_float64(rows, columns):
    x = hard_matrices(rows, columns)
    u, sizes, v = np.linalg.svd(x, full_matrices=False)
    sizes = sizes / (np.linalg.norm(sizes, axis=1, keepdims=True) + 1e-8)
    for _ in range(5):
        sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
    got = np.asarray(jax.jit(newton_schulz)(jnp.asarray(x, jnp.bfloat16)), np.float64)
    # Values that should be 0 come from rounding the matrix, times 3.4445^5: single steps are as far from float64.
    # With a mean, three steps on one Gram matrix would be 8 off.
    assert np.linalg.norm(got - (u * sizes[:, None]) @ v, 2, axis=(1, 2)).max() < 0.25
    assert np.linalg.norm(got, 2, axis=(1, 2)).max() < 1.25
    assert not got[-1].any()


def test_products_are_in_bfloat16_where_the_program_is_not_for_a_cpu():
    specs, arrays = ([x[0]] for x in matrices(1))
    traced = jax.jit(lambda x: orthogonalised(x, specs)).trace([arrays[0].astype(np.float32)])
    for platform, dtype in (("cpu", "f32"), ("cuda", "bf16"), ("tpu", "bf16")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = [line.rsplit("->")[-1] for line in text.splitlines() if "dot_general" in line]
        assert products
        assert all(f"x{dtype}>" in result for result in products)
    assert traced.out_info[0].dtype == jnp.float32
