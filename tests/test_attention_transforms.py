"""Attention under jit, grad, vmap, scan and remat, on one device and on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxprs
import kernel_cases as cases
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import garrulax as gx
from garrulax import models
from garrulax.core import sharding
from garrulax.core.sharding import make_mesh
from garrulax.kernels import masks, picking
from garrulax.kernels.attention import attention
from garrulax.kernels.mask import Mask
from garrulax.kernels.passes import ForwardBackward
from garrulax.kernels.sharded import Sharded
from garrulax.kernels.xla import Chunked

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = Chunked(scores=4 * 8 * 8)  # chunks of 8 x 8 for four heads
N = 3


def examples(**shapes):
    r = np.random.default_rng(4)
    return {name: jnp.asarray(r.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def value(x, mask, implementation=SMALL):
    learned = {name: x[name] for name in ("bias", "sinks") if name in x}
    out = attention(x["query"], x["key"], x["value"], mask=mask, implementation=implementation, **learned)
    return jnp.sum(jnp.sin(out))


def assert_close(a, b, bound=2e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=bound * np.abs(y).max())


@pytest.mark.parametrize(
    ("bias", "of_mask"),
    [((2, 4, 1, 16), False), ((1, 4, 16, 16), True)]
    + [pytest.param((1, n, 16, 16), m, marks=pytest.mark.slow) for n, m in ((4, False), (1, False), (1, True))]
    + [pytest.param((2, 4, 1, 16), True, marks=pytest.mark.slow)],
    ids=str,
)
def test_vmap_is_a_loop(of_mask, bias):
    """Of outputs and gradients, with or without a mask of each, and with a bias that is not mapped."""
    x = examples(query=(N, 2, 16, 4, 8), key=(N, 2, 16, 2, 8), value=(N, 2, 16, 2, 8), bias=bias, sinks=(4,))
    mapped = dict.fromkeys(("query", "key", "value"), 0) | dict.fromkeys(("bias", "sinks"))
    mask = cases.packed(16)
    many = Mask(
        {name: jnp.stack([jnp.roll(s, i, 1) for i in range(N)]) for name, s in mask.query.items()}, None, mask.rule
    )
    step = jax.jit(jax.value_and_grad(value))
    got = jax.jit(jax.vmap(step, (mapped, 0 if of_mask else None)))(x, many if of_mask else mask)
    for i in range(N):
        one = {name: v if mapped[name] is None else v[i] for name, v in x.items()}
        alone = step(one, jax.tree.map(lambda s, i=i: s[i], many) if of_mask else mask)
        assert_close(jax.tree.map(lambda g, i=i: g[i], got), alone)


def test_vmap_inside_a_mesh():
    """The axis of vmap is not one of the mesh's: every device maps over its part."""
    mesh, mask = make_mesh("data=2,tensor=2,sequence=2"), cases.packed(16)
    x = examples(query=(N, 2, 16, 4, 8), key=(N, 2, 16, 2, 8), value=(N, 2, 16, 2, 8), bias=(2, 4, 1, 16))
    axes = dict.fromkeys(("query", "key", "value"), 0) | {"bias": None}
    expected = jax.jit(jax.vmap(jax.value_and_grad(value), (axes, None)))(x, mask)
    spec = P(None, "data", "sequence", "tensor")
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(v, NamedSharding(mesh, spec if v.ndim == 5 else P())) for name, v in x.items()}
        for way in ("gather", "ring"):
            run = functools.partial(value, implementation=Sharded(SMALL, way))
            got = jax.jit(jax.vmap(jax.value_and_grad(run), (axes, None)))(placed, mask)
            assert_close(got, expected)


@pytest.mark.parametrize("policy", cases.some([None, "dots_saveable", "nothing_saveable"], "dots_saveable"))
def test_scan_and_remat_are_straight_code(policy):
    """Layers of different windows in one scan, as GPT-3 has them."""
    x = examples(query=(2, 16, 4, 8), key=(2, 16, 2, 8), value=(2, 16, 2, 8))
    mask = cases.with_positions(cases.packed(16))
    reaches = jnp.array([3, 2**30, 5])

    def layer(x, reach):
        out = attention(**x, mask=masks.within(mask, reach), implementation=SMALL)
        return {**x, "query": x["query"] + out}, None

    def straight(x):
        for reach in reaches:
            x, _ = layer(x, reach)
        return jnp.sum(jnp.sin(x["query"]))

    def scanned(x):
        body = layer if policy is None else jax.checkpoint(layer, policy=getattr(jax.checkpoint_policies, policy))
        return jnp.sum(jnp.sin(jax.lax.scan(body, x, reaches)[0]["query"]))

    assert_close(jax.jit(jax.value_and_grad(scanned))(x), jax.jit(jax.value_and_grad(straight))(x))


@dataclasses.dataclass(frozen=True)
class Marked(ForwardBackward):
    """Whose passes can be found in a program."""

    def unsupported_reason(self, options, operands):
        return None

    def forward(self, options, operands):
        return jax.jit(_marked_forward, static_argnums=0)(options, operands)

    def backward(self, options, operands, *rest):
        return jax.jit(_marked_backward, static_argnums=0)(options, operands, *rest)


def _marked_forward(options, operands):
    return SMALL.forward(options, operands)


def _marked_backward(options, operands, *rest):
    return SMALL.backward(options, operands, *rest)


@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2,sequence=2"])
@pytest.mark.parametrize(("remat", "forwards"), [("none", 1), ("dots", 1), ("full", 2)])
def test_a_rematted_layer_runs_attention_forward_once(remat, forwards, mesh, monkeypatch):
    """Unless it is to keep nothing. A scan holds a layer once, the backward scan another time."""
    monkeypatch.setattr(picking.Registry, "pick", lambda *_: Sharded(Marked()))
    config = tiny.CONFIGS["llama"]
    params, tokens = tiny.params(config), jnp.ones((2, 8), jnp.int32)

    def loss(params, tokens):
        return gx.forward(params, tokens, config, remat=remat)[0].sum()

    def names(params, tokens):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr
        return [eqn.params.get("name") for eqn in jaxprs.equations(jaxpr)]

    if mesh:
        mesh = make_mesh(mesh)
        with jax.set_mesh(mesh):
            places = sharding.shardings(models.llama.parameters(config), mesh, "tp")
            tokens = jax.device_put(tokens, NamedSharding(mesh, sharding.token_sharding(mesh)))
            found = names(jax.device_put(params, places), tokens)
    else:
        found = names(params, tokens)
    assert (found.count("_marked_forward"), found.count("_marked_backward")) == (forwards, 1)
