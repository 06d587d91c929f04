"""The TPU's kernels, interpreted on the CPU, against the dense formula in float64.

The generic interpreter proves the arithmetic. The TPU's own looks for races between copies, fills fresh memory with
NaN and delays every copy until something waits for it. Both go through the same kernels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice

from garrulax.kernels.attention import REGISTRY, attention, request
from garrulax.kernels.call import Options
from garrulax.kernels.experimental.tpu import TpuAttention, forward, memory, schedule
from garrulax.kernels.mask import Mask
from garrulax.kernels.xla import Chunked

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = TpuAttention(block_q=128, block_k=128, interpret=True)
BOUND = 5e-6


@pytest.mark.parametrize("case", cases.some(cases.CASES, "bigbird"))  # the next tests have others
def test_masks(case):
    cases.assert_agrees(SMALL, cases.CASES[case](300), (300, 300, 4, 2, 16, 24), bound=BOUND)


@pytest.mark.parametrize("extra", cases.some(cases.EXTRAS))  # the next tests have them all
def test_extras(extra):
    cases.assert_agrees(SMALL, cases.window(200), (200, 200, 4, 2, 16), extras=(extra,), bound=BOUND)


def test_gradients_of_huge_scores():
    """float32's lowest number is left out: in base 2 it is -inf."""
    cases.assert_huge_scores_agree(SMALL, BOUND, biases=(-1e9, 1e9))


@pytest.mark.slow
def test_extras_together_and_a_mask_with_empty_rows():
    extras = ("softcap", "alibi", "relative", "bias", "sinks", "dropout")
    cases.assert_agrees(SMALL, cases.nothing(200), (200, 200, 2, 1, 16), extras=extras, bound=2 * BOUND)


@pytest.mark.parametrize(
    ("shape", "extras"),
    [
        pytest.param((200, 200, 3, 3, 64), (), marks=pytest.mark.slow),
        pytest.param((150, 150, 11, 1, 16), (), marks=pytest.mark.slow),
        ((100, 100, 18, 2, 16), ("alibi", "bias", "dropout")),
    ],
    ids=["MHA", "MQA", "parts"],
)
def test_heads(shape, extras):
    """9 query heads of a key/value head are three parts of 3 heads, and 11 of them 11 parts of one."""
    cases.assert_agrees(SMALL, cases.packed(shape[0]), shape, extras=extras, bound=2 * BOUND)


@pytest.mark.parametrize(("C", "Cv"), cases.some([(64, 64), (80, 96), (128, 64), (256, 128), (192, 256)], (80, 96)))
def test_widths(C, Cv):
    cases.assert_agrees(SMALL, cases.causal(130), (130, 130, 2, 1, C, Cv), bound=BOUND)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(jnp.bfloat16, 2e-2), pytest.param(jnp.float16, 2e-3, marks=pytest.mark.slow)],
    ids=["bf16", "f16"],
)
def test_narrow_dtypes(dtype, bound):
    cases.assert_agrees(SMALL, cases.packed(200), (200, 200, 4, 2, 16), dtype=dtype, bound=bound)


@pytest.mark.parametrize("case", cases.some(["cached", "tree"], "tree"))
def test_more_keys_than_queries(case):
    cases.assert_agrees(SMALL, getattr(cases, case)(40, 300), (40, 300, 4, 2, 16), bound=BOUND)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "extras"),
    [
        (TpuAttention(block_q=512, block_k=256, chunk=128, interpret=True), ("alibi", "dropout")),
        *(
            pytest.param(kernel, ("alibi", "relative", "shared_bias", "dropout"), marks=pytest.mark.slow)
            for kernel in (
                TpuAttention(block_q=256, block_k=256, chunk=128, interpret=True),
                TpuAttention(block_q=512, block_k=128, interpret=True),
                TpuAttention(interpret=True),
            )
        ),
    ],
    ids=["both", "chunks", "strips", "default"],
)
def test_blocks(kernel, extras):
    """Several chunks of a block's keys and several strips of its queries; dropout and ALiBi count both. ALiBi counts
    from a block's first query: scores round as numbers of slope x block_q do, 256 here."""
    cases.assert_agrees(kernel, cases.packed(400), (400, 400, 2, 1, 16), extras=extras, bound=4 * BOUND)


@pytest.mark.slow
def test_keys_in_several_spans():
    """Gradients of keys that would not fit into VMEM: three blocks of keys in two spans of two."""
    kernel = dataclasses.replace(SMALL, span_bytes=2 * 128 * 2 * 128 * 4)
    cases.assert_agrees(kernel, cases.packed(300), (300, 300, 2, 1, 16), extras=("key_bias", "dropout"), bound=BOUND)


def test_vmap():
    q, k, v, c = (jnp.asarray(x, jnp.float32) for x in cases.inputs(130, 130, 2, 1, 16))
    masks = [cases.packed(130), cases.packed(130)]
    masks[1] = Mask({**masks[1].query, "segment": masks[1].query["segment"] % 2})
    both = jax.tree.map(lambda *x: jnp.stack(x), *masks)

    def gradients(q, mask, implementation=SMALL):
        return jax.vjp(lambda *x: attention(*x, mask=mask, implementation=implementation), q, k, v)[1](c)

    got = jax.jit(jax.vmap(gradients))(jnp.stack([q, -q]), both)
    for i, mask in enumerate(masks):
        expected = jax.jit(gradients, static_argnums=2)([q, -q][i], mask, "dense")
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_scan_and_remat():
    """Two layers in a scan that computes them again on the way back."""
    q, k, v, c = (jnp.asarray(x, jnp.float32) for x in cases.inputs(130, 130, 2, 1, 16))
    mask = cases.prefix(130)

    def loss(q, implementation):
        @jax.checkpoint
        def layer(x, scale):
            return x + attention(x * scale, k, v, mask=mask, implementation=implementation), None

        return jnp.sum(c * jax.lax.scan(layer, q, jnp.array([0.5, 1.5]))[0])

    got, expected = (jax.jit(jax.grad(loss), static_argnums=1)(q, i) for i in (SMALL, Chunked()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_other_data_are_no_other_program():
    """The schedule is traced: moving the documents compiles nothing."""
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in cases.inputs(200, 200, 2, 1, 16))
    f = jax.jit(lambda mask: attention(q, k, v, mask=mask, implementation=SMALL))
    mask = cases.packed(200)
    whole = Mask({**mask.query, "segment": 0 * mask.query["segment"]})
    assert not np.allclose(f(mask), f(whole))
    assert f._cache_size() == 1


@pytest.mark.slow
def test_the_same_twice():
    q, k, v, c = (jnp.asarray(x, jnp.float32) for x in cases.inputs(200, 200, 4, 2, 16))

    @jax.jit
    def gradients(q):
        return jax.vjp(lambda *x: attention(*x, mask=cases.packed(200), implementation=SMALL), q, k, v)[1](c)

    for x, y in zip(gradients(q), gradients(q), strict=True):
        np.testing.assert_array_equal(x, y)


def test_schedule():
    """Every active block once, in order, with its bits; rows without one get their first block, which is partial."""
    r = np.random.default_rng(3)
    some = r.random((3, 5, 7)) < 0.3
    some[1] = False
    every = some & (r.random(some.shape) < 0.5)
    words, batch, count = jax.jit(schedule.block_schedule)(some, every)
    got = [
        (int(b), int(schedule.row(w)), int(schedule.column(w)), int(w) & 31)
        for w, b in zip(words[: int(count)], batch, strict=False)
    ]
    expected = []
    for b in range(3):
        for row in range(5):
            columns = np.flatnonzero(some[b, row]).tolist() or [0]
            for i, column in enumerate(columns):
                opens = schedule.FIRST_OF_BATCH * (row == 0 and i == 0)
                closes = schedule.LAST_OF_BATCH * (row == 4 and i == len(columns) - 1)
                ends = schedule.FIRST_OF_ROW * (i == 0) + schedule.LAST_OF_ROW * (i == len(columns) - 1)
                partial = schedule.PARTIAL * (not every[b, row, column])
                expected.append((b, row, column, opens + closes + ends + partial))
    assert got == expected


def abstract(T, S=None, B=1, H=2, K=1, C=128, dtype=jnp.bfloat16):
    shapes = (B, T, H, C), (B, S or T, K, C), (B, S or T, K, C)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.eval_shape(lambda *x: request(*x, *(None,) * 7, 0.0, None)[1], *arrays)


def test_refusals():
    kernel, options = REGISTRY.implementation("pallas_tpu"), Options(Mask({}).rule, 1.0)
    assert kernel.unsupported_reason(options, abstract(1 << 17, B=2)) is None
    assert "blocks are more than its list holds" in kernel.unsupported_reason(options, abstract(1 << 17, B=3))
    assert "4097" in TpuAttention(block_q=128, block_k=128).unsupported_reason(options, abstract(4097 * 128, 128))
    wide = TpuAttention(block_q=8192, block_k=4096).unsupported_reason(options, abstract(1 << 16))
    assert "of 56 MiB of vector memory" in wide
    with jax.enable_x64(True):
        assert "float64" in kernel.unsupported_reason(options, abstract(128, dtype=jnp.float64))
        x = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.float64)
        with pytest.raises(ValueError, match=r"pallas_tpu.*float64"):
            jax.eval_shape(lambda x: attention(x, x, x, implementation="pallas_tpu"), x)


@pytest.mark.parametrize("G", [1, 2, 4, 8, 16, 71])
@pytest.mark.parametrize("T", [1, 129, 4096])
def test_default_blocks_are_whole(T, G):
    sizes = TpuAttention().sizes(abstract(T, H=G))
    assert sizes.block_q % 128 == sizes.block_k % 128 == sizes.block_k % sizes.chunk == sizes.span % sizes.block_k == 0
    assert sizes.block_q <= max(128, 2 * T)


@pytest.mark.parametrize("G", [1, 2, 8, 9, 32, 64, 71])
@pytest.mark.parametrize("C", [64, 256, 512])
def test_default_blocks_fit_into_the_memory_of_every_chip(G, C):
    """What they need does not grow with the query heads that share a key/value head; v4 has a quarter of the memory."""
    for kind, limit in {"TPU v4": 16, "TPU v5 lite": 128, "TPU v5": 64, "TPU v6 lite": 128}.items():
        of_chip = memory.vector_memory(AbstractDevice(device_kind=kind, num_cores=1, platform="tpu"))
        for dtype in (jnp.bfloat16, jnp.float32):
            arrays = abstract(40_000, H=G, C=C, dtype=dtype)
            sizes = memory.choose_sizes(arrays, of_chip, None, None, of_chip.span)
            assert G % sizes.heads == 0
            assert memory.needed(arrays, sizes) <= of_chip.limit < limit << 20


@pytest.fixture
def states(monkeypatch):
    """The race detectors of all kernels that are run, in order."""
    found = []
    make = interpreter.RaceDetectionState

    def recorded(*args, **kwargs):
        found.append(make(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(interpreter, "RaceDetectionState", recorded)
    yield found
    interpreter.reset_tpu_interpret_mode_state()


def checked(kernel=SMALL):
    """The kernel in the TPU's interpreter."""
    parameters = {"detect_races": True, "uninitialized_memory": "nan", "dma_execution_mode": "on_wait"}
    if "on_race" in {f.name for f in dataclasses.fields(pltpu.InterpretParams)}:
        parameters["on_race"] = "warn"
    return dataclasses.replace(kernel, interpret=pltpu.InterpretParams(**parameters))


@pytest.mark.parametrize(
    ("case", "extras"),
    [
        pytest.param("packed", (), marks=pytest.mark.slow),
        ("nothing", ("alibi",)),
        pytest.param("window", ("key_bias",), marks=pytest.mark.slow),
        pytest.param("bigbird", ("dropout", "relative", "softcap"), marks=pytest.mark.slow),
    ],
)
def test_no_races_and_no_use_of_fresh_memory(states, case, extras):
    mask = cases.CASES[case](200)
    cases.assert_agrees(checked(), mask, (200, 200, 2, 1, 16), extras=extras, bound=BOUND)
    assert len(states) >= 2
    assert not any(s.races_found for s in states)


def test_control_a_race_is_found(states, monkeypatch):
    """Gradients that are overwritten while they are copied out."""

    def hasty(source, target):
        def run(semaphore):
            copy = pltpu.make_async_copy(source, target, semaphore)
            copy.start()
            source[...] = jnp.zeros_like(source)
            copy.wait()

        pl.run_scoped(run, semaphore=pltpu.SemaphoreType.DMA)

    monkeypatch.setattr(pltpu, "sync_copy", hasty)
    with pytest.raises(AssertionError):
        cases.assert_agrees(checked(), cases.causal(128), (128, 128, 1, 1, 16), bound=BOUND)
    assert any(s.races_found for s in states)


@pytest.mark.slow
def test_control_fresh_memory_is_found(states, monkeypatch):
    """A row that starts from what is in its memory."""
    monkeypatch.setattr(forward, "FIRST_OF_ROW", 0)
    with pytest.raises(AssertionError):
        cases.assert_agrees(checked(), cases.causal(128), (128, 128, 1, 1, 16), bound=BOUND)
