"""Attention on meshes of eight devices against one device: outputs and every gradient."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import kernel_cases as cases
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core.collectives import collectives, total
from garrulax.core.sharding import make_mesh
from garrulax.kernels.attention import attention
from garrulax.kernels.call import Operands, Options
from garrulax.kernels.dense import Dense
from garrulax.kernels.mask import All, Mask
from garrulax.kernels.masks import causal
from garrulax.kernels.sequence import choose_strategy
from garrulax.kernels.sharded import Sharded
from garrulax.kernels.xla import Chunked

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = Chunked(scores=4 * 8 * 8)  # chunks of 8 x 8 for four heads
BOUNDS = {"float32": 2e-6, "float64": 1e-13}


def placed(mesh, x, *axes):
    """x with its first dimensions split over these axes, those of size 1 left whole."""
    spec = P(*(axis if n > 1 else None for n, axis in zip(x.shape, axes, strict=False)))
    return jax.device_put(x, NamedSharding(mesh, spec))


def assert_same_on_mesh(mesh, layout, case, shape, implementation, *, extras=(), precision="float32"):
    """As the dense formula on one device. layout: the mesh axes of (batch, length, query heads, key heads), and of
    the keys' length where that is another."""
    T, S, H = shape[:3]
    batch, length, heads, kv_heads, *keys = layout
    of_keys = keys[0] if keys else length
    mesh = make_mesh(mesh)
    with jax.enable_x64(precision == "float64"):
        mask = cases.CASES[case](T)
        if {"alibi", "relative"} & set(extras):
            mask = cases.with_positions(mask)
        *operands, cotangent = (jnp.asarray(x, precision) for x in cases.inputs(*shape))
        options = {name: x for e in extras for name, x in cases.extra(e, H, T, S).items()}
        options = jax.tree.map(
            lambda x: x if isinstance(x, float) or x.dtype != np.float64 else x.astype(precision), options
        )
        expected = cases.run(operands, cotangent, mask, options, Dense())
        with jax.set_mesh(mesh):
            query, cotangent = (placed(mesh, x, batch, length, heads) for x in (operands[0], cotangent))
            key, value = (placed(mesh, x, batch, of_keys, kv_heads) for x in operands[1:])
            streams = {name: placed(mesh, s, batch, length) for name, s in mask.query.items()}
            of_tokens = Mask(streams, None, mask.rule)
            got = cases.run((query, key, value), cotangent, of_tokens, options, implementation)
    error = jax.tree.map(cases._relative_error, got, expected)
    assert max(jax.tree.leaves(error)) <= BOUNDS[precision], error


@pytest.mark.parametrize(
    "layout", [("data", "sequence", "tensor", None, None), (None, None, None, "tensor", "sequence")]
)
def test_keys_may_be_split_otherwise_than_queries(layout):
    """Whole where queries are split, or split where they are whole: then they are gathered."""
    mesh = "data=2,tensor=2,sequence=2"
    assert_same_on_mesh(mesh, layout, "packed", (16, 16, 4, 2, 8), SMALL, extras=("bias",), precision="float64")


def test_an_own_shard_map_around_it():
    """Over all axes of the mesh, and over one of two: the others stay Explicit."""
    mesh, mask = make_mesh("data=2,tensor=4"), cases.packed(16)
    *operands, _ = (jnp.asarray(x, jnp.float32) for x in cases.inputs(16, 16, 4, 4, 8))
    expected = attention(*operands, mask=mask, implementation=SMALL)
    run = functools.partial(attention, implementation=SMALL)
    for names in ({"data", "tensor"}, {"data"}):
        spec = P("data", None, "tensor" if "tensor" in names else None)
        with jax.set_mesh(mesh):
            placed_ = [jax.device_put(x, NamedSharding(mesh, P("data", None, "tensor"))) for x in operands]
            streams = jax.device_put(mask, NamedSharding(mesh, P("data")))
            f = jax.shard_map(
                lambda q, k, v, m: run(q, k, v, mask=m), in_specs=(spec, spec, spec, P("data")), out_specs=spec,
                axis_names=names,
            )  # fmt: skip
            got = jax.jit(f)(*placed_, streams)
        np.testing.assert_allclose(got, expected, atol=2e-6)


BATCH_AND_HEADS = ("data", None, "tensor", "tensor")
SEQUENCE = ("data", "sequence", "tensor", "tensor")
ALONE = (None, "sequence", None, None)
WAYS = ("gather", "ring")


@pytest.mark.parametrize(
    ("extra", "implementation"),
    cases.some(
        [(extra, SMALL) for extra in cases.EXTRAS] + [(extra, Dense()) for extra in ("bias", "sinks", "dropout")],
        *((extra, SMALL) for extra in ("relative", "bias")),
        ("dropout", Dense()),
    ),
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_batch_and_heads(extra, implementation):
    assert_same_on_mesh(
        "data=2,tensor=4", BATCH_AND_HEADS, "packed", (24, 24, 8, 4, 8), implementation, extras=(extra,),
        precision="float64",
    )  # fmt: skip


@pytest.mark.parametrize(("H", "K"), cases.some([(8, 1), (8, 2), (12, 3), (12, 6)], (8, 1), (12, 3)))
def test_fewer_key_heads_than_devices(H, K):
    """Each device reads the keys of its queries; the gradient of shared ones is summed."""
    layout = ("data", None, "tensor", None)
    assert_same_on_mesh("data=2,tensor=4", layout, "prefix", (12, 12, H, K, 8), SMALL, precision="float64")


@pytest.mark.parametrize(
    ("case", "implementation"),
    cases.some(
        [(case, Sharded(SMALL, "ring")) for case in cases.CASES]
        + [(case, Sharded(SMALL, "gather")) for case in ("packed", "bigbird", "nothing")]
        + [("packed", Dense())],
        *((case, Sharded(SMALL, "ring")) for case in ("sinks_and_window", "nothing")),
        ("bigbird", Sharded(SMALL, "gather")),
        ("packed", Dense()),
    ),
    ids=lambda x: x if isinstance(x, str) else getattr(x, "sequence", "dense"),
)
def test_sequence(case, implementation):
    assert_same_on_mesh("sequence=8", ALONE, case, (64, 64, 2, 1, 8), implementation)


@pytest.mark.parametrize(
    ("case", "heads", "precision", "way"),
    cases.some(
        [
            (*case, way)
            for case in (
                ("packed", (4, 2), "float32"),
                ("packed", (4, 2), "float64"),
                ("infilling", (4, 1), "float64"),
                ("sinks_and_window", (4, 2), "float64"),
            )
            for way in WAYS
        ],
        ("packed", (4, 2), "float64", "ring"),
        ("infilling", (4, 1), "float64", "gather"),
    ),
)
def test_sequence_with_batch_and_heads(case, heads, precision, way):
    layout = SEQUENCE if heads[1] > 1 else (*SEQUENCE[:3], None)
    assert_same_on_mesh(
        "data=2,tensor=2,sequence=2", layout, case, (32, 32, *heads, 8, 12), Sharded(SMALL, way), precision=precision
    )


@pytest.mark.parametrize(
    ("extra", "way"),
    cases.some(
        [(e, w) for e in cases.EXTRAS for w in WAYS if (e, w) != ("dropout", "ring")],
        *((e, "ring") for e in ("sinks", "relative")),
        ("dropout", "gather"),
    ),
)
def test_extras_with_sequence(extra, way):
    assert_same_on_mesh(
        "tensor=2,sequence=4", (None, "sequence", "tensor", "tensor"), "window", (32, 32, 4, 2, 8), Sharded(SMALL, way),
        extras=(extra,), precision="float64",
    )  # fmt: skip


@pytest.mark.parametrize("way", cases.some(WAYS, "ring"))
def test_huge_scores_with_sequence(way):
    """Parts of a row with different numbers of keys: float32 has no digits for the difference of their lses."""
    mesh = make_mesh("sequence=8")

    def place(operands, mask):
        query, key, value, bias, cotangent = operands
        tokens = [placed(mesh, x, None, "sequence") for x in (query, key, value, cotangent)]
        streams = {name: placed(mesh, s, None, "sequence") for name, s in mask.query.items()}
        placed_bias = placed(mesh, bias, None, None, "sequence")
        return (*tokens[:3], placed_bias, tokens[3]), Mask(streams, None, mask.rule)

    with jax.set_mesh(mesh):
        cases.assert_huge_scores_agree(Sharded(SMALL, way), 2e-6, place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_parallel": "tree"}, "context_parallel='tree': choose from gather, ring"),
        ({"context_parallel": "ring", "dropout": 0.1, "dropout_key": jax.random.key(0)}, "use gather, or no dropout"),
    ],
)
def test_what_cannot_be_asked_for(options, message):
    x = jnp.ones((1, 8, 2, 4))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, **options)


@pytest.mark.parametrize(
    ("implementation", "extras", "reason"),
    [(SMALL, ("dropout",), "a ring would drop other probabilities"), (Dense(), (), "only implementations of two")],
)
def test_what_a_ring_refuses(implementation, extras, reason):
    with pytest.raises(ValueError, match=reason):
        assert_same_on_mesh(
            "sequence=8", ALONE, "window", (32, 32, 4, 2, 8), Sharded(implementation, "ring"), extras=extras
        )


@pytest.mark.parametrize(
    ("heads", "tokens", "parts", "dropout", "expected"),
    [
        ((32, 32), 4096, 4, 0.0, "gather"),
        ((32, 32), 4096, 8, 0.0, "ring"),  # 1.5 GiB
        ((32, 8), 4096, 8, 0.0, "gather"),
        ((32, 8), 4096, 32, 0.0, "ring"),
        ((32, 1), 65536, 32, 0.0, "gather"),  # 1.5 GiB too, but a feed-forward layer takes more
        ((32, 32), 4096, 8, 0.1, "gather"),
    ],
)
def test_the_way_across_a_sequence(heads, tokens, parts, dropout, expected):
    """By the bytes that are gathered: tests/test_aot_sequence.py compiles both ways."""
    H, K = heads
    arrays = (jax.ShapeDtypeStruct((1, tokens, n, 128), jnp.bfloat16) for n in (H, K, K))
    assert choose_strategy(Options(All(), 1.0, dropout=dropout), Operands(*arrays, {}, {}), parts) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_what_the_two_ways_cost(kv_heads):
    """As `kernels.sequence` says, in compiled programs: bytes that a device sends, and temporary memory."""
    T, mesh, sent, memory = 1024, make_mesh("sequence=8"), {}, {}
    for way in WAYS:
        with jax.set_mesh(mesh):
            q, k, v = (placed(mesh, jnp.ones((1, T, n, 32)), None, "sequence") for n in (8, kv_heads, kv_heads))
            run = functools.partial(attention, mask=causal(1, T), implementation=Sharded(Chunked(), way))
            step = jax.jit(jax.grad(lambda *x, run=run: run(*x).sum(), (0, 1, 2))).lower(q, k, v).compile()
        sent[way] = total(collectives(step.as_text(), mesh.shape)) / (k.nbytes + v.nbytes)
        memory[way] = step.memory_analysis().temp_size_in_bytes
    once = 7 / 8  # of keys and values: a device has its own part. Both passes use what was gathered once here.
    assert 2 * once <= sent["gather"] <= 2.1 * once
    assert 3 * once <= sent["ring"] <= 3.1  # and one message more a pass, which nobody reads
    assert memory["ring"] < memory["gather"] / 3


@pytest.mark.parametrize(("way", "moved"), [(None, "all_gather"), ("ring", "ppermute")])
def test_what_moves_between_devices(way, moved):
    """Keys by the one way or the other, and the ring holds no array as long as the sequence."""
    T, mesh, options = 64, make_mesh("sequence=8"), {"implementation": SMALL, "context_parallel": way}
    with jax.set_mesh(mesh):
        query, key = (placed(mesh, jnp.ones((1, T, n, 4)), None, "sequence") for n in (4, 4))
        step = jax.grad(lambda q, k: attention(q, k, k, mask=causal(1, T), **options).sum(), (0, 1))
        program = jax.make_jaxpr(step)(query, key).jaxpr
    maps = [eqn for eqn in jaxprs.equations(program) if eqn.primitive.name == "shard_map"]
    assert len(maps) == 2  # forward, backward
    for eqn in maps:
        inner = [e for body in jaxprs.inside(eqn) for e in jaxprs.equations(body)]
        names = {e.primitive.name for e in inner}
        assert names & {"all_gather", "ppermute"} == {moved}
        longest = max(n for e in inner for v in e.outvars for n in v.aval.shape)
        assert longest == (T if moved == "all_gather" else T // 8)
