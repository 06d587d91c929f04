"""Which implementation computes a request, what is refused, and what the families hand over."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import jaxprs
import kernel_cases as cases
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.kernels import picking
from garrulax.kernels.attention import IMPLEMENTATIONS, PREFERRED, REGISTRY, attention, request
from garrulax.kernels.dense import Dense
from garrulax.kernels.masks import causal
from garrulax.kernels.passes import ForwardBackward
from garrulax.kernels.sharded import Sharded
from garrulax.kernels.xla import Chunked

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (2, 8, 4, 16)
QKV = (jnp.ones(SHAPE),) * 3


def abstract(platform, kind):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return AbstractMesh((1,), ("x",), axis_types=(AxisType.Explicit,), abstract_device=device)


@dataclasses.dataclass(frozen=True)
class Seen(ForwardBackward):
    """Records the requests, and computes zeros."""

    requests: list = dataclasses.field(default_factory=list, compare=False)
    reason: str | None = None

    def unsupported_reason(self, options, operands):
        return self.reason

    def forward(self, options, operands):
        self.requests.append((options, operands))
        B, T, H, _ = operands.query.shape
        return jnp.zeros((B, T, H, operands.value.shape[3]), operands.query.dtype), jnp.zeros((B, H, T))

    def backward(self, options, operands, lse, delta, cotangent):
        raise NotImplementedError


@pytest.fixture
def seen(monkeypatch):
    chosen = Seen()
    monkeypatch.setattr(picking.Registry, "pick", lambda *_: chosen)
    return chosen


@pytest.mark.parametrize(
    ("platform", "kind", "key"),
    [
        ("tpu", "TPU v5 lite", "tpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", "gpu sm_90"),
        ("cuda", "NVIDIA GH200 480GB", "gpu sm_90"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "gpu"),
        ("gpu", "NVIDIA B200", "gpu"),
        ("cpu", "cpu", "cpu"),
        ("abacus", "wood", "cpu"),
    ],
)
def test_candidates_follow_the_device_of_an_abstract_mesh(platform, kind, key):
    """As when a program is compiled ahead of time: by the context, or by the types of the operands."""
    picked = {"cpu": ("c",), "tpu": ("t",), "gpu": ("g",), "gpu sm_90": ("h",)}
    table = picking.Registry("x", {}, picked)
    mesh = abstract(platform, kind)
    with jax.sharding.use_abstract_mesh(mesh):
        assert table.candidates(picking.target_device(())) == picked[key]
    found = []
    shape = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    jax.eval_shape(lambda x: found.append(table.candidates(picking.target_device((x,)))), shape)
    assert found == [picked[key]]


def test_the_device_of_arrays_and_of_the_default_setting():
    here, there = jax.devices()[0], jax.devices()[5]
    assert picking.target_device(QKV) == here
    assert picking.target_device((jnp.ones(3), jax.device_put(1.0, there))) == there
    with jax.default_device(there):
        assert picking.target_device((np.ones(3),)) == there
        assert jax.jit(lambda x: x * (picking.target_device((x,)) == there))(1.0) == 1
    with jax.default_device("cpu"):
        assert picking.target_device(()) == here


@pytest.mark.parametrize(("capability", "key"), [("9.0", "sm_90"), ("8.0", "sm_80"), ("12.0", "sm_120")])
def test_the_generation_of_a_real_gpu(capability, key):
    class Device:
        platform, compute_capability = "gpu", capability

    assert picking.architecture(Device) == key


def test_every_picked_name_exists_and_the_last_computes_everything():
    for names in PREFERRED.values():
        assert all(REGISTRY.implementation(name) for name in names)
        assert names[-1] == "xla"


def test_what_refuses_is_passed_over_and_said_once(caplog, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "first", f"{__name__}:Seen")
    monkeypatch.setitem(PREFERRED, "cpu", ("first", "xla"))
    monkeypatch.setattr(Seen, "unsupported_reason", lambda *_: "it is Tuesday")
    with caplog.at_level(logging.WARNING, "garrulax"):
        for _ in range(3):
            attention(*QKV)
    assert [r.getMessage() for r in caplog.records] == ["attention: not first, because it is Tuesday"]
    with pytest.raises(ValueError, match="attention 'first' cannot compute this: it is Tuesday"):
        attention(*QKV, implementation="first")


def test_a_pick_that_has_never_run_on_a_device_is_said_once(caplog, monkeypatch):
    monkeypatch.setitem(PREFERRED, "cpu", ("pallas_tpu", "xla"))
    picking._warn_experimental.cache_clear()
    arguments = request(*QKV, *(None,) * 7, 0.0, None)
    with caplog.at_level(logging.WARNING, "garrulax"):
        REGISTRY.pick("pallas_tpu", *arguments)
        assert not caplog.records  # the caller named it
        for _ in range(3):
            REGISTRY.pick(None, *arguments)
    (record,) = caplog.records
    assert record.getMessage().startswith("attention: picked pallas_tpu, which has never run on a device")
    assert 'implementation="xla"' in record.getMessage()


def test_kernels_are_not_left_to_the_partitioner():
    """In Auto mode: the chunked implementation is, a kernel says why not."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    operands = [jax.device_put(jnp.ones((8, *SHAPE[1:])), NamedSharding(mesh, P("rows"))) for _ in range(3)]
    with pytest.raises(ValueError, match="over mesh axes in Auto mode: make rows Explicit"):
        attention(*operands, implementation=Seen())
    out = jax.jit(attention)(*operands)
    assert not out.sharding.is_fully_replicated
    np.testing.assert_allclose(out, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bias": jnp.ones((2, 4, 8, 8), bool)}, TypeError, "bias is bool: .* mask"),
        ({"bias": jnp.ones((3, 4, 8, 8))}, ValueError, r"bias \(3, 4, 8, 8\) does not broadcast"),
        ({"bias": jnp.ones((8, 8))}, ValueError, r"bias \(8, 8\) does not broadcast"),
        ({"sinks": jnp.ones(3)}, ValueError, r"sinks has shape \(3,\) for 4 heads"),
        ({"sinks": jnp.ones(4, int)}, TypeError, "sinks is int32"),
        ({"alibi": jnp.ones(4, int), "mask": cases.with_positions(cases.causal(8))}, TypeError, "alibi is int32"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"dropout": 1.0}, ValueError, r"rate in \[0, 1\)"),
    ],
    ids=str,
)
def test_misfits_of_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        attention(*QKV, **options)


def test_an_unknown_strategy_for_a_sequence_is_named():
    with pytest.raises(ValueError, match="unknown strategy 'relay' for a sequence: choose from gather, ring"):
        Sharded(Chunked(), "relay")


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize(("dtype", "message"), [("int32", "{} is int32"), ("bfloat16", "one dtype")])
def test_misfits_of_dtypes_are_named(name, dtype, message):
    operands = dict(zip(("query", "key", "value"), QKV, strict=True))
    operands[name] = operands[name].astype(dtype)
    with pytest.raises(TypeError, match=message.format(name)):
        attention(**operands)


@pytest.mark.parametrize(("axis", "name"), [(0, "batch"), (1, "length"), (2, "heads"), (3, "width")])
def test_nothing_to_attend_is_an_error(axis, name):
    empty = jnp.ones([0 if i == axis else n for i, n in enumerate(SHAPE)])
    with pytest.raises(ValueError, match="no empty arrays"):
        attention(empty, empty, empty)


def test_a_scale_that_is_an_array_is_as_exact_as_a_number():
    """It is multiplied into the query: one rounding, as that of the product of scores and a number."""
    query, key, value, _ = cases.inputs(64, 64, 4, 2, 16)
    query, key, value = (jnp.asarray(x, jnp.float32) for x in (query * 4, key, value))
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (query, key, value)]
        expected = np.asarray(attention(*wide, mask=cases.causal(64), scale=0.25 / 3, implementation="dense"))
    scale = jnp.float32(0.25) / 3
    errors = [
        float(np.abs(np.asarray(attention(query, key, value, mask=cases.causal(64), scale=s)) - expected).max())
        for s in (0.25 / 3, scale)
    ]
    assert errors[1] <= max(2 * errors[0], 1e-6)
    gradient = jax.grad(lambda s: attention(query, key, value, mask=cases.causal(64), scale=s).sum())(scale)
    assert np.isfinite(gradient)
    assert gradient != 0


def _projections(config):
    params = spec.abstract(models.parameters(config))
    tokens = jnp.arange(46).reshape(2, 23) % config.vocab
    return jax.make_jaxpr(lambda p: gx.forward(p, tokens, config))(params).jaxpr


def _shapes(jaxpr):
    return [v.aval.shape for eqn in jaxprs.equations(jaxpr) for v in eqn.outvars]


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_families_have_no_attention_of_their_own(family, seen):
    """With attention taken out, nothing is left that has a number for every pair of 23 tokens; and each layer asked
    for it once (a scan is traced once)."""
    config = tiny.CONFIGS[family]
    jaxpr = _projections(config)
    assert len(seen.requests) == 1
    assert not [shape for shape in _shapes(jaxpr) if shape.count(23) > 1]


def test_the_search_for_scores_finds_them(monkeypatch):
    monkeypatch.setattr(picking.Registry, "pick", lambda *_: Dense())
    jaxpr = _projections(tiny.CONFIGS["gpt"])
    assert [shape for shape in _shapes(jaxpr) if shape.count(23) > 1]


def test_falcons_bias_is_never_spread_over_the_queries(seen):
    config = tiny.CONFIGS["falcon"]
    _projections(config)
    ((_, operands),) = seen.requests
    assert operands.bias.shape == (2, config.heads, 1, 23)


def test_a_bias_keeps_its_dimensions_of_one():
    mask = causal(2, 8)
    for shape in ((1, 4, 8, 8), (2, 1, 1, 8), (1, 1, 1, 8)):
        _, operands = request(*QKV, mask, jnp.ones(shape), None, None, None, None, None, 0.0, None)
        assert operands.bias.shape == shape
