"""The same loss and gradients on every mesh of eight devices as on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import garrulax as gx
from garrulax import models
from garrulax.core import sharding, spec
from garrulax.core.strategies import STRATEGIES, Strategy, check_strategy
from garrulax.kernels import masks

CONFIGS = {
    **{name: entry.sharded for name, entry in registry.FAMILIES.items()},
    "alibi": models.llama.Config(
        vocab=96, context=24, width=32, layers=2, heads=4, kv_heads=4, mlp_width=48, positions="alibi",
        normalized_head=True, dialect="baichuan",
    ),
    "strided": models.gpt.Config(vocab=96, context=24, width=32, layers=2, heads=4, band=5, band_stride=4),
    "one key": models.chatglm.Config(  # one key/value head, which two devices cannot split
        vocab=96, context=24, width=32, layers=1, heads=4, kv_heads=1, mlp_width=48,
    ),
}  # fmt: skip
ODD = models.gpt.Config(vocab=97, context=24, width=36, layers=1, heads=3)
FAMILIES = ("gpt", "glm", "llama")
#: Every strategy on a mesh for it; all axes of the mesh are used. Strategy, mesh.
PLANS = [
    ("ddp", "data=8"),
    ("ddp", "data=2,sequence=4"),
    ("fsdp", "fsdp=8"),
    ("fsdp", "data=2,fsdp=4"),
    ("hsdp", "data=2,fsdp=4"),
    ("hsdp", "data=2,fsdp=2,tensor=2"),
    ("tp", "data=2,tensor=4"),
    ("fsdp+tp", "data=2,fsdp=2,tensor=2"),
    ("fsdp+tp", "fsdp=4,tensor=2"),
    ("fsdp+tp", "fsdp=2,sequence=2,tensor=2"),
    ("fsdp+tp+sp", "data=2,fsdp=2,tensor=2"),
    ("fsdp+tp+sp", "fsdp=2,tensor=4"),
    ("ddp", "pipeline=2,data=4"),
    ("fsdp+tp", "pipeline=2,fsdp=2,sequence=2"),
    ("fsdp+tp+sp", "pipeline=2,fsdp=2,tensor=2"),
]
BOUNDS = {"float32": 1e-5, "float64": 1e-10}
ALL = {
    (config, *plan, "float64")
    for config in CONFIGS
    for plan in PLANS
    if CONFIGS[config].layers % 2 == 0 or "pipeline" not in plan[1]
}
ALL |= {(config, *plan, "float32") for config in FAMILIES for plan in PLANS}
#: One family under every strategy, and every other on a mesh that has all axes; the rest is slow.
QUICK = {("llama", *PLANS[i], "float64") for i in (8, 10, 14)}
QUICK |= {
    (config, "fsdp+tp", "data=2,fsdp=2,tensor=2", "float64")
    for config in CONFIGS
    if config
    not in (
        *FAMILIES,
        "strided",
        "one key",
        "alibi",
        "opt",
        "gpt_neox",
        "falcon",
        "glm130b",
    )  # these declare what others do
}
QUICK |= {(config, "fsdp+tp", "fsdp=2,sequence=2,tensor=2", "float64") for config in ("glm",)}
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in sorted(ALL)]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def loss(params, tokens, config, remat="none", way=None):
    options = {} if way is None else {"context_parallel": way}
    if models.blanks(config) is not None:
        context = jnp.full_like(tokens.sum(axis=1), 7)  # sharded as the rows are
        options["mask"] = masks.prefix(context, tokens.shape[1])
    logits, _ = gx.forward(params, tokens, config, remat=remat, **options)
    top = jax.nn.logsumexp(logits, axis=-1)
    return jnp.mean(top**2) + jnp.mean(jnp.tanh(logits))


def tokens(config, dtype=np.int32):
    return np.random.default_rng(0).integers(0, config.vocab, (8, 20)).astype(dtype)


@functools.cache
def single(family, precision):
    config = CONFIGS[family]
    params = jax.tree.map(lambda x: x.astype(precision), gx.init(config, jax.random.key(1)))
    return jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, jnp.asarray(tokens(config)), config), params


def relative(a, b, floor=1e-30):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / (np.abs(np.asarray(b)).max() + floor))


def worst_errors(grads, gradients, bound):
    """The gradients that differ by more than the bound, by name. The floor is for those that are zero but for rounding:
    of a key bias without rotary positions, which the softmax does not see."""
    floor = 1e-6 * max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(gradients))
    errors = jax.tree.map(lambda a, b: relative(a, b, floor), grads, gradients)
    return {name: error for name, error in spec.named_leaves(errors).items() if error > bound}


@pytest.mark.parametrize(("family", "strategy", "mesh", "precision"), CASES)
def test_loss_and_gradients_equal_one_device(family, strategy, mesh, precision):
    config, bound = CONFIGS[family], BOUNDS[precision]
    with jax.enable_x64(precision == "float64"):
        (expected, gradients), params = single(family, precision)
        m = sharding.make_mesh(mesh)
        check_strategy(strategy, m.shape)
        places = sharding.shardings(models.parameters(config), m, strategy)
        with jax.set_mesh(m):
            sharded = jax.device_put(params, places)
            batch = jax.device_put(tokens(config), NamedSharding(m, sharding.token_sharding(m, strategy)))
            way = "ring" if "sequence=4" in mesh else None  # so that every family goes both ways
            step = jax.jit(jax.value_and_grad(loss), static_argnums=(2, 3, 4))
            value, grads = step(sharded, batch, config, "dots", way)
        assert relative(value, expected) <= bound
        assert not worst_errors(grads, gradients, bound)
        placed = jax.tree.map(lambda g, s: g.sharding.is_equivalent_to(s, g.ndim), grads, places)
        assert all(jax.tree.leaves(placed)), placed  # gradients come back where their parameters are


@pytest.mark.slow
def test_key_value_heads_may_be_fewer_than_the_devices_of_the_query_heads():
    """Two of them for four devices: each is read by two."""
    config = dataclasses.replace(CONFIGS["one key"], kv_heads=2)
    m = sharding.make_mesh("fsdp=2,tensor=4")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype("float64"), gx.init(config, jax.random.key(1)))
        expected, gradients = jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, tokens(config), config)
        with jax.set_mesh(m):
            sharded = jax.device_put(params, sharding.shardings(models.chatglm.parameters(config), m))
            batch = jax.device_put(tokens(config), NamedSharding(m, P("fsdp", None)))
            value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=2)(sharded, batch, config)
        assert relative(value, expected) <= 1e-10
        assert max(jax.tree.leaves(jax.tree.map(relative, grads, gradients))) <= 1e-10


def test_rules_may_split_the_key_value_heads_alone():
    config, m = dataclasses.replace(CONFIGS["one key"], kv_heads=2), sharding.make_mesh("data=4,tensor=2")
    params = gx.init(config, jax.random.key(1))
    expected = jax.jit(loss, static_argnums=2)(params, tokens(config), config)
    strategy = dataclasses.replace(STRATEGIES["tp"], rules=STRATEGIES["tp"].rules | {"heads": None})
    with jax.set_mesh(m):
        sharded = jax.device_put(params, sharding.shardings(models.chatglm.parameters(config), m, strategy))
        batch = jax.device_put(tokens(config), NamedSharding(m, P("data", None)))
        assert relative(jax.jit(loss, static_argnums=2)(sharded, batch, config), expected) <= 1e-5


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt", "glm"))])
def test_tokens_may_be_whole_on_every_device(family):
    config = CONFIGS[family]
    (expected, _), params = single(family, "float32")
    m = sharding.make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(m):
        sharded = jax.device_put(params, sharding.shardings(models.parameters(config), m))
        value = jax.jit(loss, static_argnums=2)(sharded, jnp.asarray(tokens(config)), config)
    assert relative(value, expected) <= 1e-5


@pytest.mark.parametrize("family", ["glm", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt", "llama"))])
def test_parameters_are_born_sharded_and_equal(family):
    config = CONFIGS[family]
    m = sharding.make_mesh("fsdp=4,tensor=2")
    born = gx.init(config, jax.random.key(1), mesh=m)
    plain = gx.init(config, jax.random.key(1))
    places = sharding.shardings(models.parameters(config), m)
    for a, b, place in zip(jax.tree.leaves(born), jax.tree.leaves(plain), jax.tree.leaves(places), strict=True):
        assert a.sharding.is_equivalent_to(place, a.ndim)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_initialisation_allocates_only_its_shard():
    config = models.gpt.Config(vocab=4096, context=64, width=256, layers=4, heads=8)
    m = sharding.make_mesh("fsdp=8")
    specs = models.parameters(config)
    make = jax.jit(lambda k: spec.init(specs, k), out_shardings=sharding.shardings(specs, m))
    memory = make.lower(jax.random.key(0)).compile().memory_analysis()
    whole = 4 * gx.count(config)
    assert memory.output_size_in_bytes < whole / 4
    assert memory.temp_size_in_bytes < whole / 4


def test_errors_name_the_axis():
    with pytest.raises(ValueError, match="unknown mesh axis 'rows'"):
        sharding.make_mesh("rows=8")
    with pytest.raises(ValueError, match="needs 4 devices, but there are 8"):
        sharding.make_mesh("fsdp=4")
    with pytest.raises(ValueError, match="not like fsdp=4"):
        sharding.make_mesh("fsdp:8")
    with pytest.raises(ValueError, match="mesh axis expert cannot be used: it is reserved"):
        sharding.make_mesh("expert=8")
    odd, mesh = models.gpt.parameters(ODD), sharding.make_mesh("fsdp=8")
    with pytest.raises(ValueError, match="no sharding rule for logical axis"):
        sharding.shardings(odd, mesh, Strategy("mine", {"embed": None}))
    with pytest.raises(
        ValueError, match=r"as many layers in every stage: .*layers=1 cannot be split 2 ways over pipeli"
    ):
        sharding.shardings(odd, sharding.make_mesh("pipeline=2,data=4"))
    with pytest.raises(ValueError, match="3 rows a device make 3 microbatches, which keep fewer than 4 stages"):
        models.pipeline.microbatches(3, 4)
    with pytest.raises(ValueError, match="unknown strategy 'zero': choose from ddp, fsdp"):
        sharding.shardings(odd, mesh, "zero")
    with pytest.raises(ValueError, match="strategy tp needs the mesh axis tensor: the mesh has fsdp"):
        check_strategy("tp", mesh.shape)
    with pytest.raises(ValueError, match="strategy fsdp does not use the mesh axis tensor=2"):
        check_strategy("fsdp", {"fsdp": 4, "tensor": 2})


def test_what_stays_whole_is_reported_by_name_and_refused_if_strict():
    odd, mesh = models.gpt.parameters(ODD), sharding.make_mesh("fsdp=4,tensor=2")
    params = gx.init(ODD, jax.random.key(0), mesh=mesh)
    held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(params))
    first, *rest = sharding.sharding_report(odd, mesh)
    assert first == f"strategy fsdp+tp on fsdp=4,tensor=2: a device holds {held:,} of {gx.count(ODD):,} parameters"
    heads = [f"  not split: blocks/attention/{n}: heads=3 cannot be split 2 ways over tensor" for n in ("out", "qkv")]
    assert set(rest) > {*heads, "  not split: tokens: vocab=97 cannot be split 2 ways over tensor"}
    by_tensor = sharding.sharding_report(odd, mesh, "tp")
    assert "  not split: positions [24, 36]: no rule shards it" in by_tensor
    assert by_tensor[-1] == "  not split: 8 norms and biases, 288 numbers"
    with pytest.raises(
        ValueError, match=r"\(strict\) leaves arrays whole: blocks/attention/.*heads=3 cannot be split 2 "
    ):
        sharding.shardings(odd, mesh, strict=True)
    assert sharding.sharding_report(odd, mesh, "ddp")[1:] == []
